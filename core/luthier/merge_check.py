"""A merged model is looked at again before it is handed over."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from luthier.errors import ModelError
from luthier.merge_plan import MergePlan
from luthier.peak import anonymous_bytes
from luthier.pretrained import from_pretrained
from luthier.weight_files import Checkpoint, open_checkpoint

_TOKENS = 16


def check_result(folder: Path, plan: MergePlan, max_memory: float) -> None:
    """Check that transformers finds every weight in `folder`, and where memory allows it that they compute.

    Raises:
        ModelError: It does not.
    """
    written = open_checkpoint(folder)
    try:
        _check_names(folder, written, plan.skeleton)
        size = sum(one.count * one.dtype.itemsize for one in written.tensors.values())
        if anonymous_bytes() + 1.2 * size < max_memory * 2**30:
            _check_numbers(folder, written, plan.skeleton)
    finally:
        written.close()


def _check_names(folder: Path, written: Checkpoint, skeleton: PreTrainedModel) -> None:
    """Compare names and shapes with those of the model that transformers builds."""
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    tied = getattr(skeleton, "all_tied_weights_keys", None) or {}
    for name, shape in expected.items():
        if name in written.tensors:
            if written.tensors[name].shape != shape:
                raise ModelError(
                    f"{folder}: {name} is {list(written.tensors[name].shape)}, not {list(shape)}"
                )
        elif name not in tied and not _prefixed(name, written, skeleton):
            raise ModelError(f"{folder}: {name} is missing; did all models have it?")


def _prefixed(name: str, written: Checkpoint, skeleton: PreTrainedModel) -> bool:
    """Whether a tensor is there without the prefix of its base model, as some checkpoints have it."""
    return name.removeprefix(f"{skeleton.base_model_prefix}.") in written.tensors


@torch.no_grad()
def _check_numbers(folder: Path, written: Checkpoint, skeleton: PreTrainedModel) -> None:
    """Load the model, compare its weights with what was written, and run a few tokens through it."""
    model = from_pretrained(type(skeleton), str(folder), dtype="auto", use_safetensors=True).eval()
    state = model.state_dict()
    for name, stored in written.tensors.items():
        if name in state and not torch.equal(state[name].view(-1), written.read(name).to(state[name].dtype)):
            raise ModelError(f"{folder}: {name} reads back differently ({stored.file.name})")
    ids = torch.arange(min(_TOKENS, model.config.get_text_config().vocab_size))[None]  # (1, tokens)
    if not torch.isfinite(model(ids, use_cache=False).logits).all():
        raise ModelError(f"{folder}: the merged model's logits are not finite; smaller weights may help")
