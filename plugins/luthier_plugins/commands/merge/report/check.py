"""A merged model is looked at again before it is handed over: by safetensors, if asked by transformers."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from luthier.errors import ModelError
from luthier.models import load_whole
from luthier_plugins.commands.merge.io.shard_writer import Layout
from luthier_plugins.commands.merge.io.weight_files import Stored, open_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHECKS = ("read", "load")
_TOKENS = 16
Part = tuple[int, int, int]
"""First byte, bytes and CRC-32 of what was written at a time."""


def read_back(layout: Layout, sums: Mapping[tuple[str, int, int], int], threads: int) -> None:
    """Read every tensor with safetensors, and compare its dtype, shape and bytes with what was written.

    Args:
        layout: What was to be written.
        sums: `ShardWriter.sums`.
        threads: Tensors that are compared at a time.

    Raises:
        ModelError: A tensor differs or is missing, or its file cannot be read.
    """
    parts: dict[str, list[Part]] = {name: [] for name in layout.tensors}
    for (name, first, count), crc in sums.items():
        parts[name].append((first, count, crc))
    for file in layout.headers:
        expected = {name: place for name, place in layout.tensors.items() if place.file == file}
        try:
            with safe_open(file, framework="pt") as stored, ThreadPoolExecutor(threads) as pool:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - mapped
                names = [name for name in expected if name in tensors]
                arguments = [(tensors[name], expected[name], parts[name]) for name in names]
                same = pool.map(_same, *zip(*arguments, strict=True)) if arguments else ()
                sound = [name for name, equal in zip(names, same, strict=True) if equal]
        except SafetensorError as error:
            raise ModelError(f"{file} cannot be read back: {error}") from error
        if wrong := sorted(expected.keys() - set(sound)):
            raise ModelError(f"{file}: {wrong[0]} reads back differently; is the disk sound?")


def _same(tensor: torch.Tensor, place: Stored, parts: Sequence[Part]) -> bool:
    if (tensor.dtype, tuple(tensor.shape)) != (place.dtype, place.shape):
        return False
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    return all(zlib.crc32(data[first : first + count].data) == crc for first, count, crc in parts)


@torch.no_grad()
def load_back(folder: Path, skeleton: PreTrainedModel) -> None:
    """Load the model in `folder` with transformers, compare its weights, and run a few tokens through it.

    Raises:
        ModelError: A weight differs, or the logits are not finite.
    """
    written = open_checkpoint(folder)
    try:
        model = load_whole(type(skeleton), str(folder), dtype="auto", use_safetensors=True).eval()
        state = model.state_dict()
        for name, stored in written.tensors.items():
            own = state.get(name)
            if own is not None and not torch.equal(own.view(-1), written.read(name).to(own.dtype)):
                raise ModelError(f"{folder}: {name} reads back differently ({stored.file.name})")
    finally:
        written.close()
    ids = torch.arange(min(_TOKENS, model.config.get_text_config().vocab_size))[None]  # (1, tokens)
    if not torch.isfinite(model(ids, use_cache=False).logits).all():
        raise ModelError(f"{folder}: the merged model's logits are not finite; smaller weights may help")
