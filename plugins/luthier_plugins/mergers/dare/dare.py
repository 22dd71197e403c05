"""DARE: drop most of what a model learnt at random, and scale up the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from luthier import ConfigError, Group, Merger, Register, hookimpl, option
from luthier_plugins.mergers.dare.random_mask import kept_at_random
from luthier_toolkits.merging import check_weights, disjoint_mean, shares_of, weights_of


@dataclass(frozen=True)
class DARE(Merger):
    """``τ̃ᵢ = mᵢ ⊙ τᵢ / (1 − p)`` with mᵢ ~ Bernoulli(1 − p), then ``θ = θ_base + λ · mean of the τ̃ᵢ``.

    The mean is the weighted one, or with ``then=ties`` that of the elected sign. What is dropped depends on
    the seed, the tensor's name, the model's name and the element's place alone.
    """

    source: ClassVar[str] = (
        "Yu et al. 2023, arXiv 2311.03099, section 3.2; ties: Yadav et al. 2023, arXiv 2306.01708, "
        "section 4.1"
    )
    needs_base: ClassVar[bool] = True

    drop: float = option(0.9, "p: probability that an element of τᵢ is dropped, in [0, 1).")
    then: Literal["average", "ties"] = option("average", "How the τ̃ᵢ are combined.")
    scaling: float = option(1.0, "λ.")
    weights: dict[str, float] = option({}, "Weights of the models by name; 1 where none is given.")
    seed: int = option(0, "Seed of what is dropped.")

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ConfigError: One is out of range.
        """
        if not 0 <= self.drop < 1:
            raise ConfigError(f"merger.drop={self.drop} must be in [0, 1)")
        if not math.isfinite(self.scaling):
            raise ConfigError(f"merger.scaling={self.scaling} must be finite")
        if self.seed < 0:
            raise ConfigError(f"merger.seed={self.seed} must not be negative")

    def check(self, labels: Sequence[str]) -> None:
        """Raise ConfigError where the weights do not fit."""
        check_weights(self.weights, labels, signed=self.then == "average")
        if self.then == "average":
            shares_of(self.weights, labels)

    def merge(self, group: Group) -> torch.Tensor:
        """Return the base and the scaled mean."""
        assert group.base is not None
        deltas = group.deltas()
        for label, delta in zip(group.labels, deltas, strict=True):
            kept = kept_at_random(delta.shape, 1 - self.drop, (self.seed, group.name, label), group.start)
            delta.mul_(kept)
        # Both ways of combining are linear: what was kept is scaled up last, and once.
        scaling = self.scaling / (1 - self.drop)
        if self.then == "ties":
            mean = disjoint_mean(deltas, weights_of(self.weights, group.labels))
            return mean.mul_(scaling).add_(group.base)
        merged = group.base.clone()
        for delta, share in zip(deltas, shares_of(self.weights, group.labels), strict=True):
            merged.add_(delta, alpha=scaling * share)
        return merged


@hookimpl
def register_mergers(register: Register) -> None:
    """Register `dare`."""
    register("dare", DARE)
