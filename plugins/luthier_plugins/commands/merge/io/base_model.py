"""The model of a checkpoint as transformers builds it from a config, without weights."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from luthier.errors import ModelError
from luthier.models import class_of, load_config, quiet, saved_kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def empty_model(folder: Path) -> PreTrainedModel:
    """Return the model of the config in `folder` on the meta device, with its head of scores if it has one.

    Raises:
        ModelError: transformers does not know it.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(str(folder))
    kind = saved_kind(getattr(config, "architectures", None))
    try:
        with torch.device("meta"), quiet():
            model = (class_of(kind) if kind else AutoModelForCausalLM).from_config(config)
    except (ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{folder}: transformers builds no model of it: {error}") from error
    return cast("PreTrainedModel", model)


def conv1d_layers(folder: Path, config: Mapping[str, Any]) -> frozenset[str]:
    """Return the layers that keep their weight as Conv1D does, (d_in, d_out), beside others that do not.

    PEFT's ``fan_in_fan_out`` is one for all layers, so an adapter does not say.

    Args:
        folder: The checkpoint's.
        config: Its ``config.json``.

    Raises:
        ModelError: transformers does not know the model.
    """
    kind = str(config.get("model_type"))
    known = kind.isidentifier() and find_spec(f"transformers.models.{kind}")
    spec = find_spec(f"transformers.models.{kind}.modeling_{kind}") if known else None
    # Importing a family and building its model takes seconds, and few have such layers.
    if spec and spec.origin and "Conv1D" not in Path(spec.origin).read_text(encoding="utf-8"):
        return frozenset()
    from transformers.pytorch_utils import Conv1D

    modules = empty_model(folder).named_modules()
    return frozenset(name for name, module in modules if isinstance(module, Conv1D))
