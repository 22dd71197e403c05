"""The largest of many magnitudes, found by selection over streamed parts and never by sorting them all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from luthier import Groups

ROOM = 1 << 20
"""Magnitudes of one model that are held at a time."""
_SIGMAS = 6.0
Place = tuple[str, int]


@dataclass(frozen=True)
class Largest:
    """Which elements belong to the k of largest magnitude.

    Attributes:
        threshold: Magnitudes from it on do, but for some that equal it:
        surplus: of some groups only the first so many of those do.
    """

    threshold: float
    surplus: Mapping[Place, int]

    def keep_(self, values: torch.Tensor, place: Place) -> None:
        """Set all others in `values`, the group at `place`, to zero."""
        size = values.abs()
        if place in self.surplus:
            equal = (size == self.threshold).view(-1).nonzero().view(-1)
            values.view(-1)[equal[self.surplus[place] :]] = 0.0
        # In place, as a comparison that yields truth values is several times slower.
        values.mul_(torch.ge(size, self.threshold, out=size))


@dataclass
class _Search:
    """The search for the k-th largest of one model's magnitudes, narrowed pass by pass.

    It lies in [least, most]. A pass over [low, high] counts what is above; it holds what is inside, or part.
    """

    least: float = 0.0
    most: float = math.inf
    low: float = 0.0
    high: float = math.inf
    every: int = 1
    above: int = 0
    inside: dict[Place, int] = field(default_factory=dict)
    held: list[tuple[Place, np.ndarray[Any, Any]]] = field(default_factory=list)
    found: Largest | None = None

    def begin(self, low: float, high: float, expected: float) -> None:
        """Start a pass over [low, high], where about so many are expected."""
        self.low, self.high, self.every = low, high, max(1, math.ceil(expected / ROOM))
        self.above, self.inside, self.held = 0, {}, []

    def look(self, place: Place, delta: torch.Tensor) -> None:
        """Take in the group at `place`."""
        size = delta.abs().view(-1).numpy()
        if self.low > 0.0 or self.high < math.inf:
            self.above += int(np.count_nonzero(size > self.high))
            size = size[(size >= self.low) & (size <= self.high)]
        self.inside[place] = len(size)
        self.held.append((place, size[:: self.every].copy() if self.every > 1 else size))

    def narrow(self, k: int, total: int) -> None:
        """Find the k-th, or choose the next pass."""
        inside = sum(self.inside.values())
        rank = k - self.above  # among those inside, from the largest
        if rank <= 0:
            self.least = _next(self.high, math.inf)
            self.begin(self.least, self.most, self.above)
        elif rank > inside:
            self.most = _next(self.low, 0.0)
            self.begin(self.least, self.most, total - self.above - inside)
        elif self.low == self.high:
            self._settle(self.low, rank, self.inside)
        elif self.every == 1:
            self._select(rank)
        else:
            self.least, self.most = self.low, self.high
            self._sample(rank / inside, inside)

    def _select(self, rank: int) -> None:
        sizes = np.concatenate([size for _, size in self.held])
        threshold = float(np.partition(sizes, len(sizes) - rank)[len(sizes) - rank])
        equal = {place: int(np.count_nonzero(size == threshold)) for place, size in self.held}
        self._settle(threshold, rank - int(np.count_nonzero(sizes > threshold)), equal)

    def _settle(self, threshold: float, wanted: int, equal: Mapping[Place, int]) -> None:
        """The first `wanted` of those equal to the threshold stay."""
        surplus = {}
        for place, count in equal.items():
            if count > wanted:
                surplus[place] = wanted
            wanted -= min(count, wanted)
        self.found, self.held = Largest(threshold, surplus), []

    def _sample(self, share: float, inside: int) -> None:
        """Bracket the k-th by quantiles of the sample; one value where the sample says it is a tie."""
        sample = np.sort(np.concatenate([size for _, size in self.held]))[::-1]
        count = len(sample)
        spread = _SIGMAS * math.sqrt(count * share * (1 - share) + 1)
        first = max(0, int(share * count - spread))
        last = min(count - 1, int(share * count + spread))
        low, high = float(sample[last]), float(sample[first])
        if last - first > count / 2 or (low <= self.least and high >= self.most):
            # It would not get narrower, as where a tie takes the room: look at one value.
            low = high = float(sample[min(count - 1, int(share * count))])
        self.begin(low, high, (last - first + 1) / count * inside)


def _next(value: float, towards: float) -> float:
    """Return the fp32 number next to `value`."""
    return float(np.nextafter(np.float32(value), np.float32(towards)))


def largest(groups: Groups, share: float) -> dict[str, Largest]:
    """Return for every model which elements of its τ belong to the ⌊share · n⌋ largest of its n magnitudes.

    Reads the groups once where a tensor's magnitudes fit into `ROOM`, else a few times. The result is exact,
    and the same however the elements are grouped: ties are settled in favour of the first.

    Args:
        groups: Groups with a base, always the same ones in the same order.
        share: In (0, 1]; at least one element stays.
    """
    totals: dict[str, int] = {}
    for group in groups():
        for label, tensor in zip(group.labels, group.tensors, strict=True):
            totals[label] = totals.get(label, 0) + tensor.numel()
    searches = {label: _Search() for label in totals}
    for label, search in searches.items():
        search.begin(0.0, math.inf, totals[label])
    while still := {label: search for label, search in searches.items() if search.found is None}:
        for group in groups():
            for label, delta in zip(group.labels, group.deltas(), strict=True):
                if label in still:
                    still[label].look(group.place, delta)
        for label, search in still.items():
            search.narrow(max(1, int(share * totals[label])), totals[label])
    return {label: search.found for label, search in searches.items() if search.found is not None}
