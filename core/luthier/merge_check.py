"""A merged model is looked at again before it is handed over."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from luthier.errors import ModelError
from luthier.merge_plan import MergePlan
from luthier.merge_skeleton import check_names
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
        check_names(str(folder), {name: one.shape for name, one in written.tensors.items()}, plan.skeleton)
        size = sum(one.count * one.dtype.itemsize for one in written.tensors.values())
        if anonymous_bytes() + 1.2 * size < max_memory * 2**30:
            _check_numbers(folder, written, plan.skeleton)
    finally:
        written.close()


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
