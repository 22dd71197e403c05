"""A residual stream in fp32 over half-precision weights: what autocast does, without weights in fp32.

Every layer adds to the stream, and in half precision each addition rounds all of it: a good part of what such
a model's log-probabilities are off by, and an objective with a reference learns from differences of those.
The first block is given fp32, additions keep it, and norms read it. Where rotary embeddings are fused, all of
the decoder is given it, so that angles are exact as well. Attention takes its scores in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from luthier.kernels.fused import is_fused
from luthier.kernels.record import note

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HALF = (torch.bfloat16, torch.float16)


def widen(model: PreTrainedModel, fused: Mapping[str, str]) -> bool:
    """Keep the residual stream of `model` in fp32, in place, where its norms can read it; return whether.

    Args:
        model: Its frozen weights are in half precision.
        fused: What `fuse` returned: only a fused norm gives its layer half precision again.
    """
    modules = dict(model.named_modules())
    norms = {name: module for name, module in modules.items() if "norm" in type(module).__name__.lower()}
    blocks = _blocks(model)
    if model.dtype not in HALF or blocks is None or not norms:
        return False
    if any(fused.get(name) != "norm" for name in norms):
        return False
    for norm in norms.values():
        note(norm, wide=True)
    watched = next(iter(norms.values()))

    def wide(tensor: torch.Tensor) -> torch.Tensor:
        # Where norms run as transformers wrote them, so does the stream.
        return tensor.float() if is_fused(watched) else tensor

    attentions = {name: m for name, m in modules.items() if type(m).__name__.endswith("Attention")}
    for attention in attentions.values():
        note(attention, wide=True)
    embeddings = model.get_input_embeddings()
    if all(fused.get(name) == "rotary" for name in attentions) and embeddings is not None:
        embeddings.register_forward_hook(lambda module, given, out: wide(out))
    else:
        blocks[0].register_forward_pre_hook(lambda module, given: (wide(given[0]), *given[1:]))
    return True


def wants_wide(chosen: bool | None, needs_reference: bool) -> bool:
    """Return what ``model.wide_residual`` means for an objective: left open, a reference asks for it."""
    return needs_reference if chosen is None else chosen


def _blocks(model: PreTrainedModel) -> nn.ModuleList | None:
    """Return the decoder's blocks: the longest list of modules right below it."""
    lists = [child for child in model.get_decoder().children() if isinstance(child, nn.ModuleList)]
    return max(lists, key=len, default=None)
