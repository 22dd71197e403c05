"""Selectors: which of several answers to one prompt is taken."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch

from luthier.contracts.method import Method
from luthier.contracts.reward_model import Candidate


class Selector(Method):
    """Chooses one of n candidates of a prompt."""

    @property
    def needs_scores(self) -> bool:
        """Whether it can choose only where something scores the candidates."""
        return True

    @abstractmethod
    def choose(self, candidates: Sequence[Candidate], scores: torch.Tensor) -> int:
        """Return the place of the one that is taken, of n with `scores` (n,) float32, higher is better.

        The same for the same candidates, whatever else was chosen before.
        """

    def expected(
        self, candidates: Sequence[Candidate], scores: torch.Tensor, values: torch.Tensor, drawn: int
    ) -> float:
        """Return the mean of `values` (n,) at what would be chosen of `drawn` of the n candidates.

        Estimated over disjoint draws; overridden where the expectation over all draws has a formula.
        """
        starts = range(0, len(candidates) - drawn + 1, drawn)
        chosen = [
            first + self.choose(candidates[first : first + drawn], scores[first : first + drawn])
            for first in starts
        ]
        return float(values[chosen].mean())

    def divergence(self, drawn: int) -> float | None:
        """Return a bound in nats on KL(what is chosen of `drawn` ‖ the policy); None: not known."""
        return None
