"""Where the trees of a step come from: rows that are there, or what the policy itself has just answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from luthier.data.sampler import Sampler
from luthier.trees import Tree


class Batches(Protocol):
    """The trees of every step: a function of how many steps are done, and of the weights at most."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one pass over the rows."""

    @property
    def repeatable(self) -> bool:
        """Whether the trees of an earlier step can be asked for again."""

    def batch(self, step: int) -> list[Tree]:
        """Return the trees of the step that follows `step` ones; every process must ask.

        Raises:
            GuardError: There should be no further step.
        """

    def metrics(self) -> Mapping[str, float]:
        """Return what is known of where the last batch came from."""


@dataclass(frozen=True)
class RowBatches:
    """Batches of the trees that rows were made into, in the sampler's order."""

    trees: Sequence[Tree]
    sampler: Sampler

    @property
    def repeatable(self) -> bool:
        """See `Batches`."""
        return True

    @property
    def steps_per_epoch(self) -> int:
        """See `Batches`."""
        return self.sampler.steps_per_epoch

    def batch(self, step: int) -> list[Tree]:
        """See `Batches`."""
        return [self.trees[place] for place in self.sampler.batch(step)]

    def metrics(self) -> Mapping[str, float]:
        """Return nothing: rows have nothing to say."""
        return {}
