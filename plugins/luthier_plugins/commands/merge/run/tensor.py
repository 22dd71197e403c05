"""One tensor merged: read in runs of elements, merged in fp32, rounded once, measured, written."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite, prod, sqrt
from typing import Any

import torch

from luthier.contracts import Group, Groups, Merger
from luthier.errors import ModelError
from luthier_plugins.commands.merge.io.inputs import MergeInput

RUN = 1 << 18
"""Elements that are merged at a time: few enough to stay in a core's cache."""


@dataclass(frozen=True)
class TensorJob:
    """A tensor of the result.

    Attributes:
        name: What it is called.
        shape: Its shape.
        dtype: What it is written in.
        inputs: The models that have it, in the order of their labels.
        base: The model that differences are taken to; None for a merger without base.
        source: The model it is copied from: it is not merged. None: it is.
        alike: It is copied as all models have the same: its statistics are taken all the same.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs: tuple[MergeInput, ...]
    base: MergeInput | None = None
    source: MergeInput | None = None
    alike: bool = False

    @property
    def count(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def readers(self) -> tuple[MergeInput, ...]:
        """Every model it is read from."""
        if self.source is not None:
            return (self.source,)
        return self.inputs if self.base is None else (*self.inputs, self.base)

    @property
    def bytes_read(self) -> int:
        """Of the models, once each."""
        return sum(self.count * model.tensors[self.name].dtype.itemsize for model in self.readers)

    @property
    def whole(self) -> int:
        """Models of which it must be read whole."""
        return sum(model.adapts(self.name) for model in self.readers)


@dataclass(frozen=True)
class MergedTensor:
    """What became of a tensor; norms are Frobenius'.

    Attributes:
        name: What it is called.
        change: ‖θ − θ₀‖ / ‖θ₀‖ of the result and the base (or the first model); 0 where it was copied.
        conflicts: Share of its elements that two models moved in opposite directions; None without base.
        rounding: ‖round(θ) − θ‖ / ‖θ‖.
        rounding_of_change: ‖round(θ) − θ‖ / ‖θ − θ₀‖; None where nothing changed.
    """

    name: str
    change: float
    conflicts: float | None
    rounding: float
    rounding_of_change: float | None


class Reading:
    """Gives the groups of a tensor; holds the whole tensor where that is small enough.

    A tensor that is copied is read once, and is every model's and the base's.

    Args:
        job: The tensor.
        merger: The method.
        keep: Elements up to which a tensor is read once and held.
    """

    def __init__(self, job: TensorJob, merger: Merger, keep: int) -> None:
        self._job, self._merger = job, merger
        self._whole = not (merger.elementwise or job.source)
        self._held = job.count <= keep or self._whole
        self._known: list[Group] = []

    def groups(self, statistics: Any = None) -> Iterator[Group]:
        """Yield the groups in the order of the tensor's elements."""
        if not self._known:
            groups = self._read()
            if self._held:
                self._known = list(groups)
        for group in self._known or self._read():
            yield group if statistics is None else replace(group, statistics=statistics)

    def _read(self) -> Iterator[Group]:
        job = self._job
        labels = tuple(model.label for model in job.inputs)
        size = job.count if self._whole else RUN
        for start in range(0, job.count, max(size, 1)):
            stop = min(start + size, job.count)
            tensors = [self._elements(model, start, stop) for model in job.readers]
            if job.source is not None:
                yield Group(job.name, labels, tuple(tensors * len(labels)), tensors[0], start)
                continue
            if self._whole:
                tensors = [tensor.view(job.shape) for tensor in tensors]
            base = None if job.base is None else tensors.pop()
            yield Group(job.name, labels, tuple(tensors), base, start)

    @cached_property
    def _layers(self) -> dict[str, torch.Tensor]:
        """The tensors that are read whole, by label."""
        return {
            model.label: model.read(self._job.name)
            for model in self._job.readers
            if model.adapts(self._job.name)
        }

    def _elements(self, model: MergeInput, start: int, stop: int) -> torch.Tensor:
        whole = self._layers.get(model.label)
        elements = model.read(self._job.name, start, stop) if whole is None else whole[start:stop]
        if not torch.isfinite(elements.sum()) and not torch.isfinite(elements).all():
            bad = int((~torch.isfinite(elements)).nonzero()[0])
            raise ModelError(
                f"{model.place}: {self._job.name} has {elements[bad]} at element {start + bad} of "
                f"{list(self._job.shape)}; leave this model out, or train it again"
            )
        return elements


def groups_of(jobs: Sequence[TensorJob], merger: Merger, keep: int) -> Groups:
    """Return what gives the groups of all `jobs` that are merged or alike, by the tensors' names."""
    ordered = sorted((job for job in jobs if job.source is None or job.alike), key=lambda job: job.name)

    def groups() -> Iterable[Group]:
        for job in ordered:
            yield from Reading(job, merger, keep).groups()

    return groups


Write = Callable[[str, int, torch.Tensor], None]


@torch.no_grad()
def merge_tensor(job: TensorJob, merger: Merger, statistics: Any, keep: int, write: Write) -> MergedTensor:
    """Merge a tensor, hand it to `write` and return what became of it.

    Args:
        job: The tensor.
        merger: The method.
        statistics: What `Merger.collect_statistics` gave for the whole model, if it needs that.
        keep: Elements up to which a tensor is read once and held.
        write: Takes the tensor's name, the first element's place and the elements.
    """
    if job.source is not None:
        return _copied(job, Reading(job, merger, keep), write)
    reading = Reading(job, merger, keep)
    if merger.statistics_over == "tensor":
        statistics = merger.collect_statistics(reading.groups)
    sums = _Sums()
    for group in reading.groups(statistics):
        merged = merger.merge(group)
        rounded = merged.to(job.dtype)
        if not torch.isfinite(merged.sum()) or not torch.isfinite(rounded.sum()):
            _refuse(job, rounded)
        sums.add(group, merged, rounded)
        write(job.name, group.start, rounded)
    return sums.result(job.name, job.base is not None)


def _refuse(job: TensorJob, rounded: torch.Tensor) -> None:
    if not torch.isfinite(rounded).all():
        kind = str(job.dtype).removeprefix("torch.")
        raise ModelError(
            f"{job.name}: the merge has values that are not finite in {kind}; choose another dtype, or "
            "smaller weights"
        )


def _copied(job: TensorJob, reading: Reading, write: Write) -> MergedTensor:
    """Copy a tensor, in runs; one that does not count in fractions as it is."""
    assert job.source is not None
    if not job.dtype.is_floating_point:
        write(job.name, 0, job.source.checkpoint.read(job.name))
        return MergedTensor(job.name, 0.0, None, 0.0, None)
    sums = _Sums()
    for group in reading.groups():
        assert group.base is not None
        rounded = group.base.to(job.dtype)
        if not torch.isfinite(rounded.sum()):
            _refuse(job, rounded)
        sums.add(replace(group, tensors=(), labels=()), group.base, rounded)
        write(job.name, group.start, rounded)
    return sums.result(job.name, False)


class _Sums:
    """Squared norms and counts, added up run by run."""

    def __init__(self) -> None:
        self.elements = self.conflicts = 0
        self.before = self.after = self.change = self.rounding = 0.0

    def add(self, group: Group, merged: torch.Tensor, rounded: torch.Tensor) -> None:
        """Take in one group."""
        start = group.tensors[0] if group.base is None else group.base
        self.before += _square(start)
        self.after += _square(merged)
        self.change += _square(merged - start)
        if rounded.dtype != merged.dtype:
            self.rounding += _square(rounded.float() - merged)
        self.elements += merged.numel()
        if group.base is not None and len(group.tensors) > 1:
            most, least = (functools.reduce(of, group.tensors) for of in (torch.maximum, torch.minimum))
            above, below = torch.gt(most, group.base, out=most), torch.lt(least, group.base, out=least)
            self.conflicts += int(torch.dot(above.view(-1), below.view(-1)))

    def result(self, name: str, based: bool) -> MergedTensor:
        """Return what they say."""
        return MergedTensor(
            name,
            change=sqrt(self.change / self.before) if self.before else 0.0,
            conflicts=self.conflicts / self.elements if based and self.elements else None,
            rounding=sqrt(self.rounding / self.after) if self.after else 0.0,
            rounding_of_change=sqrt(self.rounding / self.change) if self.change else None,
        )


def _square(values: torch.Tensor) -> float:
    flat = values.view(-1)
    square = float(torch.dot(flat, flat))
    # Large numbers overflow in fp32; the wider sum is several times slower.
    return square if isfinite(square) else float(torch.dot(flat.double(), flat.double()))
