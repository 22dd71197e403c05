"""Trees in flat numbers: 4 bytes a token in memory and, of large data, in a temporary file instead."""

from __future__ import annotations

import hashlib
import itertools
import os
import struct
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Sequence
from typing import BinaryIO, overload

import torch

from luthier.errors import DataError
from luthier.trees.tree import Branch, Tree

SPILL = 64 * 2**20
"""Numbers (256 MiB of them) that are kept in memory before they go to a file."""


class TreeStore(Sequence[Tree]):
    """A sequence of trees that grows by `append`; what it returns equals what was put in.

    Tuples of Python integers cost some 36 bytes a token. Here a tree is one run of 32-bit numbers: its
    shape, its masks as run lengths, its tokens, its origin and values.
    """

    def __init__(self, trees: Iterable[Tree] = (), spill: int = SPILL) -> None:
        """Store `trees`; more than `spill` numbers go to a temporary file that has no name."""
        self._data = _Numbers(spill)
        self._starts = array("q", [0])
        self._digests = array("q")
        self._lengths = array("i")
        self._scored = array("i")
        self._chosen: Sequence[int] | None = None
        self._names: list[str] = []
        for tree in trees:
            self.append(tree)

    def append(self, tree: Tree) -> None:
        """Put `tree` at the end.

        Raises:
            DataError: Its tokens have notes: rollouts live for some steps only, and are not stored here.
        """
        if any(branch.notes for branch in tree.branches):
            raise DataError(f"{tree.origin}: an example's tokens have no notes; those are a rollout's")
        shape, ids = (
            array("i", [len(tree.prompt), len(tree.branches), len(tree.values)]),
            array("i", tree.prompt),
        )
        for branch in tree.branches:
            runs = _runs(branch.scored)
            shape.extend((len(branch.ids), -1 if runs is None else len(runs), *(runs or ())))
            ids.extend(branch.ids)
        origin = tree.origin.encode("utf-8", "surrogatepass")
        tail = array("i", [len(origin)])
        tail.frombytes(origin + b"\0" * (-len(origin) % 4))
        for name, value in tree.values.items():
            if name not in self._names:
                self._names.append(name)
            tail.append(self._names.index(name))
            tail.frombytes(struct.pack("<d", value))
        values = repr(sorted((name, float(value)) for name, value in tree.values.items())).encode()
        content = hashlib.blake2b(shape.tobytes() + ids.tobytes() + values, digest_size=8).digest()
        self._digests.append(int.from_bytes(content, "little", signed=True))
        self._lengths.append(tree.tokens)
        self._scored.append(tree.scored_tokens)
        self._starts.append(self._data.extend(shape + ids + tail))

    def select(self, indices: Sequence[int]) -> TreeStore:
        """Return the trees at `indices`, in that order, without copying them."""
        view = TreeStore()
        view.__dict__.update(self.__dict__)
        view._chosen = array("q", [self._place(index) for index in indices])
        return view

    def lengths(self) -> torch.Tensor:
        """Return the tokens of every tree, (n,) int64."""
        return self._numbers(self._lengths)

    def scored(self) -> torch.Tensor:
        """Return the supervised tokens of every tree, (n,) int64."""
        return self._numbers(self._scored)

    def digests(self) -> torch.Tensor:
        """Return a hash of the contents of every tree, (n,) int64: tokens, masks and values, not origins.

        The same contents have the same hash on every machine and in every process.
        """
        return self._numbers(self._digests)

    def __len__(self) -> int:
        return len(self._digests) if self._chosen is None else len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Tree: ...
    @overload
    def __getitem__(self, index: slice) -> TreeStore: ...
    def __getitem__(self, index: int | slice) -> Tree | TreeStore:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        place = self._place(index)
        return self._tree(self._data.read(self._starts[place], self._starts[place + 1]))

    def _place(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return index if self._chosen is None else self._chosen[index]

    def _numbers(self, of: array[int]) -> torch.Tensor:
        numbers = torch.tensor(of, dtype=torch.int64)
        return numbers if self._chosen is None else numbers[torch.tensor(self._chosen, dtype=torch.int64)]

    def _tree(self, numbers: array[int]) -> Tree:
        prompt, count, values = numbers[:3]
        place = 3
        shapes: list[tuple[int, Sequence[int] | None]] = []
        for _ in range(count):
            length, count_runs = numbers[place : place + 2]
            place += 2
            shapes.append((length, None if count_runs < 0 else numbers[place : place + count_runs]))
            place += max(count_runs, 0)
        root = tuple(numbers[place : place + prompt])
        place += prompt
        branches = []
        for length, runs in shapes:
            branches.append(Branch(tuple(numbers[place : place + length]), _mask(runs)))
            place += length
        tail = numbers[place:].tobytes()
        size = int.from_bytes(tail[:4], "little")
        origin = tail[4 : 4 + size].decode("utf-8", "surrogatepass")
        pairs = struct.iter_unpack("<id", tail[4 + size + -size % 4 :])
        named = {self._names[name]: value for name, value in pairs} if values else {}
        return Tree(root, tuple(branches), origin, named)


class _Numbers:
    """32-bit numbers one after the other: the last in memory, those before in a nameless file."""

    def __init__(self, spill: int) -> None:
        self.spill = spill
        self.recent = array("i")
        self.filed = 0
        self.file: BinaryIO | None = None

    def extend(self, numbers: array[int]) -> int:
        """Append `numbers` and return how many there are now."""
        self.recent.extend(numbers)
        if len(self.recent) >= self.spill:
            try:
                # Unlinked as soon as it is open: nothing is left behind, however the run ends.
                if self.file is None:
                    self.file = tempfile.TemporaryFile(prefix="luthier-trees-")  # noqa: SIM115
                    weakref.finalize(self, self.file.close)
                self.file.write(memoryview(self.recent).cast("B"))
                self.file.flush()
            except OSError as error:
                raise DataError(
                    f"the encoded data does not fit in {tempfile.gettempdir()}: {error.strerror}; "
                    "set TMPDIR to a folder with room"
                ) from error
            self.filed += len(self.recent)
            self.recent = array("i")
        return self.filed + len(self.recent)

    def read(self, start: int, stop: int) -> array[int]:
        """Return the numbers from `start` to `stop`, which were appended together."""
        if self.file is None or start >= self.filed:
            return self.recent[start - self.filed : stop - self.filed]
        numbers = array("i")
        # A read of its own instead of a map of the file: pages that were read are not the process's.
        numbers.frombytes(os.pread(self.file.fileno(), 4 * (stop - start), 4 * start))
        return numbers


def _runs(mask: Sequence[bool] | None) -> list[int] | None:
    """Return the lengths of the runs of equal flags, beginning with one of False that may be empty."""
    if mask is None:
        return None
    lengths = [(flag, sum(1 for _ in run)) for flag, run in itertools.groupby(mask, bool)]
    return [0] * (bool(lengths) and lengths[0][0]) + [length for _, length in lengths]


def _mask(runs: Sequence[int] | None) -> tuple[bool, ...] | None:
    if runs is None:
        return None
    return tuple(
        itertools.chain.from_iterable((place % 2 == 1,) * length for place, length in enumerate(runs))
    )
