"""The model that a merge must fit: as transformers builds it from a config, without weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from luthier.errors import ModelError
from luthier.merge_inputs import MergeInput
from luthier.pretrained import from_pretrained, quiet
from luthier.score_head import CLASSES, saved_kind


def empty_model(of: MergeInput) -> PreTrainedModel:
    """Return the model of a checkpoint's config, without weights: a language model, or with a head of scores.

    Raises:
        ModelError: transformers does not know it.
    """
    config = from_pretrained(AutoConfig, str(of.checkpoint.folder))
    kind = saved_kind(getattr(config, "architectures", None))
    try:
        with torch.device("meta"), quiet():
            model = CLASSES.get(kind or "", AutoModelForCausalLM).from_config(config)
    except (ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{of.checkpoint.folder}: transformers builds no model of it: {error}") from error
    assert isinstance(model, PreTrainedModel)
    return model


def tied_names(model: PreTrainedModel) -> Mapping[str, str]:
    """Return tensors that are another one under a second name → that one."""
    if not model.config.get_text_config().tie_word_embeddings:
        return {}
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def check_names(where: str, shapes: Mapping[str, tuple[int, ...]], skeleton: PreTrainedModel) -> None:
    """Compare names and shapes of tensors with those of the model that transformers builds.

    Args:
        where: What has the tensors, for the message.
        shapes: Theirs.
        skeleton: The model.

    Raises:
        ModelError: One is missing, or of another shape.
    """
    tied = getattr(skeleton, "all_tied_weights_keys", None) or {}
    for name, tensor in skeleton.state_dict().items():
        if name in shapes:
            if shapes[name] != tuple(tensor.shape):
                raise ModelError(f"{where}: {name} is {list(shapes[name])}, not {list(tensor.shape)}")
        # Some checkpoints have their tensors without the prefix of the base model.
        elif name not in tied and name.removeprefix(f"{skeleton.base_model_prefix}.") not in shapes:
            raise ModelError(f"{where}: {name} is missing, which {type(skeleton).__name__} has")
