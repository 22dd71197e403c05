"""Checkpoints in safetensors, single or sharded, read lazily: any run of elements, nothing mapped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from luthier.errors import ModelError

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH = 8
"""Bytes in front of a file's header, which say how long it is."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies.

    Attributes:
        file: The file.
        dtype: Of its elements.
        shape: Its shape.
        offset: Of its first byte in the file.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def count(self) -> int:
        """Elements."""
        return prod(self.shape)


class Checkpoint:
    """The tensors of a folder; files stay open until `close`. May be read from several threads at once."""

    def __init__(self, folder: Path, tensors: Mapping[str, Stored]) -> None:
        self.folder, self.tensors = folder, tensors
        self._open = {
            file: os.open(file, os.O_RDONLY) for file in {stored.file for stored in tensors.values()}
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return the elements [start, stop) of the tensor `name` as they are stored, (stop − start,).

        Raises:
            ModelError: The file has become shorter.
        """
        stored = self.tensors[name]
        width = stored.dtype.itemsize
        stop = stored.count if stop is None else stop
        buffer = np.empty((stop - start) * width, np.uint8)
        place, done = stored.offset + start * width, 0
        while done < len(buffer):
            count = os.preadv(self._open[stored.file], [buffer.data[done:]], place + done)
            if not count:
                raise ModelError(f"{stored.file} ends in the middle of {name}; was it written meanwhile?")
            done += count
        return torch.from_numpy(buffer).view(stored.dtype)

    def borrow(self, name: str, of: str) -> None:
        """Give the tensor `of` a second name."""
        self.tensors = {**self.tensors, name: self.tensors[of]}

    def expect(self, name: str) -> None:
        """Let the system read the tensor `name` ahead."""
        stored = self.tensors[name]
        os.posix_fadvise(
            self._open[stored.file],
            stored.offset,
            stored.count * stored.dtype.itemsize,
            os.POSIX_FADV_WILLNEED,
        )

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors."""
        return sorted(self._open)

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open = {}


def open_checkpoint(folder: Path, single: str = "model.safetensors") -> Checkpoint:
    """Open the safetensors of `folder`.

    Raises:
        ModelError: A shard is missing, truncated or damaged, or there are none.
    """
    index = folder / INDEX
    if not index.is_file():
        if not (folder / single).is_file():
            raise ModelError(f"{folder} holds neither {single} nor {INDEX}")
        return Checkpoint(folder, dict(_tensors(folder / single)))
    try:
        where: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(where.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is damaged: expected a weight_map, {error}") from error
    if gone := [shard for shard in shards if not (folder / shard).is_file()]:
        raise ModelError(f"{folder} lacks {', '.join(gone)}, named by {INDEX}; copy the model again")
    tensors = {name: stored for shard in shards for name, stored in _tensors(folder / shard)}
    if lost := sorted(set(where) - set(tensors)):
        raise ModelError(f"{folder}: {lost[0]} is in {INDEX} and in no shard ({len(lost)} such tensors)")
    return Checkpoint(folder, {name: tensors[name] for name in where})


def _tensors(file: Path) -> Iterator[tuple[str, Stored]]:
    header, begin = read_header(file)
    size = file.stat().st_size
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            whole = all(type(number) is int for number in (*shape, first, last))
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{file} is damaged: its header says nothing sensible of {name}") from error
        if not whole or not isinstance(dtype, str):
            raise ModelError(f"{file} is damaged: its header says nothing sensible of {name}")
        if dtype not in DTYPES:
            raise ModelError(f"{file}: {name} is of type {dtype}; expected one of {', '.join(DTYPES)}")
        stored = Stored(file, DTYPES[dtype], shape, begin + first)
        if last - first != stored.count * stored.dtype.itemsize:
            raise ModelError(
                f"{file} is damaged: {name} has {last - first} bytes for the shape {list(shape)}"
            )
        if begin + last > size:
            raise ModelError(
                f"{file} is truncated: {name} ends at byte {begin + last} of {size}; copy the file again"
            )
        yield name, stored
    _check_sound(file)


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file, and where its data begin.

    Raises:
        ModelError: It is none.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(LENGTH), "little")
        if not 2 <= length <= file.stat().st_size - LENGTH:
            raise ModelError(f"{file} is truncated, or no safetensors file")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{file} is damaged: {error}") from error
    if not isinstance(header, dict):
        raise ModelError(f"{file} is damaged: its header is no table")
    return header, LENGTH + length


def _check_sound(file: Path) -> None:
    """Let safetensors look at the header: names once each, no gaps, no overlaps, nothing behind the data.

    Raises:
        ModelError: It refuses the file, as transformers would.
    """
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise ModelError(f"{file} is damaged: {error}; copy the file again") from error
