"""The model that a merge must fit: as transformers builds it from a config, without weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from luthier.errors import ModelError
from luthier_plugins.commands.merge.io.inputs import MergeInput

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def may_tie(model: MergeInput) -> bool:
    """Whether a tensor of `model`, stored or adapted, may be another one under a second name.

    Those are embeddings and output heads: as many rows as there are tokens.
    """
    config = model.config.get("text_config") or model.config
    if config.get("tie_word_embeddings") is False:
        return False
    rows = config.get("vocab_size")
    large = [name for name, tensor in model.tensors.items() if rows is None or rows in tensor.shape]
    return len(large) > 1 or any(map(model.adapts, large))


def tied_names(model: PreTrainedModel) -> Mapping[str, str]:
    """Return tensors that are another one under a second name → that one."""
    if not model.config.get_text_config().tie_word_embeddings:
        return {}
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def shared_names(model: PreTrainedModel) -> Mapping[str, str]:
    """Return tensors that a model of this class may have as its own or share → with which."""
    names = getattr(model, "_tied_weights_keys", None)
    state = model.state_dict().keys()
    pairs = names.items() if isinstance(names, Mapping) else ()
    return {name: of for name, of in pairs if {name, of} <= state}


def ties(model: MergeInput, skeleton: PreTrainedModel) -> bool:
    """Whether the output head of `model` is its embedding: as its config says, or its family has it."""
    config = model.config.get("text_config") or model.config
    usual = getattr(type(skeleton.config.get_text_config()), "tie_word_embeddings", False)
    return bool(config.get("tie_word_embeddings", usual))


def check_names(where: str, shapes: Mapping[str, tuple[int, ...]], skeleton: PreTrainedModel) -> None:
    """Compare names and shapes of tensors with those of the model that transformers builds, or stores.

    Args:
        where: What has the tensors, for the message.
        shapes: Theirs.
        skeleton: The model.

    Raises:
        ModelError: One is missing, or of another shape.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = skeleton.state_dict()
    if _misfit(state, shapes, skeleton) is None:
        return
    # Some families, as Mixtral, are stored in other pieces and under other names than they run with.
    if fault := _misfit(revert_weight_conversion(skeleton, state), shapes, skeleton):
        raise ModelError(f"{where}: {fault}")


def _misfit(
    state: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], skeleton: PreTrainedModel
) -> str | None:
    tied = getattr(skeleton, "all_tied_weights_keys", None) or {}
    for name, tensor in state.items():
        if name in shapes:
            if shapes[name] != tuple(tensor.shape):
                return f"{name} is {list(shapes[name])}, not {list(tensor.shape)}"
        # Some checkpoints have their tensors without the prefix of the base model.
        elif name not in tied and name.removeprefix(f"{skeleton.base_model_prefix}.") not in shapes:
            return f"{name} is missing, which {type(skeleton).__name__} has"
    return None
