"""Best-of-N: the answer with the highest score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from luthier import Candidate, Register, Selector, hookimpl


@dataclass(frozen=True)
class BestOfN(Selector):
    """argmax r(x, y_i) over N samples; of equal scores the first."""

    source: ClassVar[str] = (
        "Stiennon et al. 2020, arXiv 2009.01325, appendix G.3; expectation: Nakano et al. 2021, arXiv "
        "2112.09332; that the divergence is a bound: Beirami et al. 2024, arXiv 2401.01879"
    )

    def choose(self, candidates: Sequence[Candidate], scores: torch.Tensor) -> int:
        """Return the place of the highest score."""
        return int(scores.argmax())

    def expected(
        self, candidates: Sequence[Candidate], scores: torch.Tensor, values: torch.Tensor, drawn: int
    ) -> float:
        """Return Σ_i C(i−1, N−1)/C(n, N) v_(i), v ordered by score."""
        count = len(scores)
        weights = [math.comb(place, drawn - 1) / math.comb(count, drawn) for place in range(count)]
        # Equal scores: the first of them is chosen, so it is the last in this order.
        order = (-scores).argsort(stable=True).flip(0)
        return float(values.double()[order] @ torch.tensor(weights, dtype=torch.float64))

    def divergence(self, drawn: int) -> float:
        """Return log N − (N−1)/N."""
        return math.log(drawn) - (drawn - 1) / drawn


@hookimpl
def register_selectors(register: Register) -> None:
    """Register `best_of_n`."""
    register("best_of_n", BestOfN)
