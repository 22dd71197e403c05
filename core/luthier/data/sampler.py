"""The order in which examples are seen: a new permutation every epoch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampler:
    """Batches of example indices: a new permutation every epoch, a function of seed and epoch alone.

    Attributes:
        size: Number of examples.
        batch_size: Examples a step; the last step of an epoch may have fewer.
        shuffle: Permute, or keep the order of the data.
        seed: Seed of the permutations.
    """

    size: int
    batch_size: int
    shuffle: bool
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one pass over the data."""
        return -(-self.size // self.batch_size)

    def visited(self, steps: int) -> Sequence[int]:
        """Return the indices that the first `steps` steps see, ascending."""
        if steps >= self.steps_per_epoch:
            return range(self.size)
        return sorted({index for step in range(steps) for index in self.batch(step)})

    def batch(self, step: int) -> Sequence[int]:
        """Return the indices of the step that follows `step` ones."""
        epoch, place = divmod(step, self.steps_per_epoch)
        first, last = place * self.batch_size, min((place + 1) * self.batch_size, self.size)
        if not self.shuffle:
            return range(first, last)
        batch: list[int] = _order(self.size, self.seed, epoch)[first:last].tolist()
        return batch


@functools.lru_cache(maxsize=1)
def _order(size: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
