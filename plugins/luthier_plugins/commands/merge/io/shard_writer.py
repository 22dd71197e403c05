"""Sharded safetensors written in any order: every tensor has its place before the first is there."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from luthier_plugins.commands.merge.io.weight_files import INDEX, LENGTH, NAMES, Stored

_ALIGN = 8


@dataclass(frozen=True)
class Layout:
    """Which tensor goes where.

    Attributes:
        folder: Where the files are.
        tensors: Every tensor's place.
        headers: The bytes every file begins with.
        sizes: Every file's size in bytes.
        total: Bytes of all tensors.
    """

    folder: Path
    tensors: Mapping[str, Stored]
    headers: Mapping[Path, bytes]
    sizes: Mapping[Path, int]
    total: int


def lay_out(
    folder: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], shard_bytes: int
) -> Layout:
    """Return where the tensors go in `folder`: one file, or shards of `shard_bytes` at most."""
    groups: list[dict[str, int]] = [{}]
    room = shard_bytes
    for name, (dtype, shape) in tensors.items():
        size = Stored(folder, dtype, shape, 0).count * dtype.itemsize
        if groups[-1] and size > room:
            groups.append({})
            room = shard_bytes
        groups[-1][name] = size
        room -= size
    places: dict[str, Stored] = {}
    headers, sizes = {}, {}
    for number, group in enumerate(groups, 1):
        single = len(groups) == 1
        file = folder / (
            "model.safetensors" if single else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        )
        headers[file] = _header(tensors, group)
        offset = len(headers[file])
        for name, size in group.items():
            places[name] = Stored(file, *tensors[name], offset)
            offset += size
        sizes[file] = offset
    return Layout(folder, places, headers, sizes, sum(size for group in groups for size in group.values()))


def _header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], group: Mapping[str, int]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, size in group.items():
        dtype, shape = tensors[name]
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH + len(text)) % _ALIGN)
    return len(text).to_bytes(LENGTH, "little") + text


class ShardWriter:
    """Writes a layout; may be called from several threads at once. Files that are there already are kept.

    Attributes:
        sums: (tensor, first byte, bytes) → CRC-32 of what was written there.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.sums: dict[tuple[str, int, int], int] = {}
        self._open = {file: os.open(file, os.O_RDWR | os.O_CREAT, 0o644) for file in layout.headers}
        for file, descriptor in self._open.items():
            os.pwrite(descriptor, layout.headers[file], 0)
            os.truncate(descriptor, layout.sizes[file])

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Put `values` at the element `start` of the tensor `name`."""
        stored = self.layout.tensors[name]
        data = values.contiguous().view(-1).view(torch.uint8).numpy()
        first = start * stored.dtype.itemsize
        self.sums[name, first, len(data)] = zlib.crc32(data.data)
        place, done = stored.offset + first, 0
        while done < len(data):
            done += os.pwrite(self._open[stored.file], data.data[done:], place + done)

    def flush(self) -> None:
        """Return once everything written is on the disk."""
        for descriptor in self._open.values():
            os.fsync(descriptor)

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open = {}


def write_index(folder: Path, layout: Layout) -> None:
    """Write the index of a layout of several files."""
    if len(layout.headers) == 1:
        return
    where = {name: stored.file.name for name, stored in layout.tensors.items()}
    index = {"metadata": {"total_size": layout.total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
