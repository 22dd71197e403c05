"""TIES: trim, elect a sign, average what agrees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from luthier import ConfigError, Group, Groups, Merger, Register, hookimpl, option
from luthier_plugins.mergers.ties.top_k import ROOM, Largest, largest
from luthier_toolkits.merging import check_weights, disjoint_mean, weights_of


@dataclass(frozen=True)
class TIES(Merger):
    """``θ = θ_base + λ · mean of the trimmed τᵢ that have the elected sign``, element by element.

    Of every ``τᵢ = θᵢ − θ_base`` the share `density` that is largest in magnitude stays: of each tensor, or
    of the whole model as in the paper. Among equals at the threshold the first stay.
    """

    source: ClassVar[str] = "Yadav et al. 2023, arXiv 2306.01708, section 4.1 and algorithm 1"
    needs_base: ClassVar[bool] = True

    density: float = option(0.2, "Share of every τᵢ that stays, in (0, 1].")
    scaling: float = option(1.0, "λ.")
    trim: Literal["tensor", "model"] = option(
        "tensor", "What the share is of: every tensor, or the whole model, which is read three times."
    )
    weights: dict[str, float] = option({}, "Weights of the models by name; 1 where none is given.")

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ConfigError: One is out of range.
        """
        if not 0 < self.density <= 1:
            raise ConfigError(f"merger.density={self.density} must be in (0, 1]")
        if not math.isfinite(self.scaling):
            raise ConfigError(f"merger.scaling={self.scaling} must be finite")

    workspace: ClassVar[int] = 3 * ROOM

    @property
    def statistics_over(self) -> Literal["nothing", "tensor", "model"]:
        """A density of 1 trims nothing."""
        return self.trim if self.density < 1 else "nothing"

    def check(self, labels: Sequence[str]) -> None:
        """Raise ConfigError where the weights do not fit."""
        check_weights(self.weights, labels, signed=False)

    def collect_statistics(self, groups: Groups) -> dict[str, Largest]:
        """Return what stays of every model."""
        return largest(groups, self.density)

    def merge(self, group: Group) -> torch.Tensor:
        """Return the base and the scaled mean."""
        deltas = group.deltas()
        if group.statistics is not None:
            kept: dict[str, Largest] = group.statistics
            for label, delta in zip(group.labels, deltas, strict=True):
                kept[label].keep_(delta, group.place)
        mean = disjoint_mean(deltas, weights_of(self.weights, group.labels))
        assert group.base is not None
        return mean.mul_(self.scaling).add_(group.base)


@hookimpl
def register_mergers(register: Register) -> None:
    """Register `ties`."""
    register("ties", TIES)
