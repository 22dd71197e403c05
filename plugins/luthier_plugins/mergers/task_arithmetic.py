"""Task arithmetic: the base and a sum of what every model learnt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from luthier import ConfigError, Group, Merger, Register, hookimpl, option
from luthier_toolkits.merging import check_weights, weights_of


@dataclass(frozen=True)
class TaskArithmetic(Merger):
    """``θ = θ_base + λ Σ wᵢ τᵢ`` with ``τᵢ = θᵢ − θ_base``; a negative weight makes a model forget."""

    source: ClassVar[str] = "Ilharco et al. 2022, arXiv 2212.04089, section 2"
    needs_base: ClassVar[bool] = True

    scaling: float = option(1.0, "λ.")
    weights: dict[str, float] = option({}, "wᵢ by the model's name; 1 where none is given.")

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ConfigError: λ is not finite.
        """
        if not math.isfinite(self.scaling):
            raise ConfigError(f"merger.scaling={self.scaling} must be finite")

    def check(self, labels: Sequence[str]) -> None:
        """Raise ConfigError where the weights do not fit."""
        check_weights(self.weights, labels)

    def merge(self, group: Group) -> torch.Tensor:
        """Return the base and the scaled sum."""
        assert group.base is not None
        merged = group.base.clone()
        for delta, factor in zip(group.deltas(), self.coefficients(group.labels), strict=True):
            merged.add_(delta, alpha=factor)
        return merged

    def coefficients(self, labels: Sequence[str]) -> list[float]:
        """``λ wᵢ``."""
        return [self.scaling * weight for weight in weights_of(self.weights, labels)]


@hookimpl
def register_mergers(register: Register) -> None:
    """Register `task_arithmetic`."""
    register("task_arithmetic", TaskArithmetic)
