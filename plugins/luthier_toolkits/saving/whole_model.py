"""Saving a whole model in transformers' layout, and reading it back to be sure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from luthier.errors import ModelError
from luthier.kernels import unfused
from luthier.models import as_classifier, load_whole, quiet, told, verify_tokenizer, without_value
from luthier.system import written_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE_LENGTH = 16


def save_model(
    model: nn.Module, tokenizer: Any | None, folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Write `model` and `tokenizer` to `folder` as transformers does, read them back, then put them there.

    A model with a score head is written as transformers' class for it: see `luthier.models.score_head`.

    Args:
        model: A transformers model without adapters; tied weights are written once.
        tokenizer: Saved beside it, if given.
        folder: Replaced if it exists; an error leaves what was there.
        dtype: Round the floating-point weights to this dtype; the model itself keeps its own.

    Raises:
        ModelError: The model is none of transformers', or what was read back differs.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"only transformers models can be saved in their layout, not {type(model).__name__}")
    dtype = dtype or model.dtype
    whole = as_classifier(model)
    with written_whole(folder) as fresh, without_value(whole):
        with quiet():
            whole.save_pretrained(fresh, state_dict=_rounded(whole, dtype))
        _set_dtype(fresh / "config.json", dtype)
        verify_saved(whole, fresh, dtype)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
            verify_tokenizer(tokenizer, fresh)


def verify_saved(model: PreTrainedModel, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Load `folder` again and compare: weights and logits must be exactly those of `model` in `dtype`.

    Args:
        model: What was saved.
        folder: Where.
        dtype: What it was saved in; the model's own by default.

    Raises:
        ModelError: A weight or the logits of a few tokens differ.
    """
    dtype = dtype or model.dtype
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "device_map": {"": model.device}}
    saved = load_whole(type(model), str(folder), by_shapes=False, **options).eval()
    mine, theirs = _rounded(model, dtype), saved.state_dict()
    wrong = [name for name, tensor in mine.items() if not _equal(tensor, theirs.get(name))]
    if wrong:
        raise ModelError(f"{folder}: {wrong[0]} reads back differently ({len(wrong)} tensors do)")
    ours = told(str(folder), lambda: _logits(model, mine, saved.config._attn_implementation))
    if not _equal(ours, _logits(saved, {}, None)):
        raise ModelError(f"{folder}: equal weights read back give other logits; its config differs")


def _set_dtype(config: Path, dtype: torch.dtype) -> None:
    """Say what the weights were saved in: transformers writes what the model in memory has."""
    values = {**json.loads(config.read_text(encoding="utf-8")), "dtype": str(dtype).removeprefix("torch.")}
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _rounded(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the state of `model` with floating-point tensors in `dtype`; tied ones stay one tensor."""
    done: dict[tuple[int, torch.Size], torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        wanted = dtype if tensor.is_floating_point() else tensor.dtype
        state[name] = done.setdefault((tensor.data_ptr(), tensor.shape), tensor.to(wanted))
    return state


def _equal(mine: torch.Tensor, theirs: torch.Tensor | None) -> bool:
    return theirs is not None and mine.dtype == theirs.dtype and torch.equal(mine, theirs)


@torch.no_grad()
def _logits(model: PreTrainedModel, weights: dict[str, torch.Tensor], attention: str | None) -> torch.Tensor:
    """Return the logits of a few tokens with `weights` and `attention` in place of the model's own."""
    length = min(_PROBE_LENGTH, model.config.vocab_size)
    ids = torch.arange(length, device=model.device)[None]  # (1, length)
    training, own = model.training, model.config._attn_implementation
    model.eval()
    if attention is not None:
        model.set_attn_implementation(attention)
    try:
        with torch.autocast(model.device.type, enabled=False), unfused(model):
            output = torch.func.functional_call(model, weights, (ids,), {"use_cache": False})
    finally:
        model.train(training)
        model.set_attn_implementation(own)
    return output.logits  # type: ignore[no-any-return]
