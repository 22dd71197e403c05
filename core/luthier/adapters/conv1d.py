"""transformers' Conv1D, the linear layer of GPT-2 that keeps its weight as (d_in, d_out)."""

import sys

from torch import nn

from luthier.adapters.adapted_module import base_of


def is_conv1d(layer: nn.Module) -> bool:
    """Whether `layer` is one, changed or not; transformers is not imported for the answer."""
    known = sys.modules.get("transformers.pytorch_utils")  # no layer is one before it is there
    return known is not None and isinstance(base_of(layer), known.Conv1D)
