"""Model soup: the weighted mean of models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from luthier import Group, Merger, Register, hookimpl, option
from luthier_toolkits.merging import check_weights, shares_of


@dataclass(frozen=True)
class Soup(Merger):
    """``θ = Σ wᵢ θᵢ / Σ wᵢ``. For a greedy soup, which leaves out what does not help, add ``greedy=true``."""

    source: ClassVar[str] = "Wortsman et al. 2022, arXiv 2203.05482, section 2"

    weights: dict[str, float] = option({}, "wᵢ by the model's name; 1 where none is given.")

    def check(self, labels: Sequence[str]) -> None:
        """Raise ConfigError where the weights do not fit."""
        check_weights(self.weights, labels)
        shares_of(self.weights, labels)

    def merge(self, group: Group) -> torch.Tensor:
        """Return the mean, counted from the first model, so that models that agree stay what they are."""
        first, *others = group.tensors
        mean = first.clone()
        for tensor, share in zip(others, shares_of(self.weights, group.labels)[1:], strict=True):
            mean.add_(tensor - first, alpha=share)
        return mean

    def coefficients(self, labels: Sequence[str]) -> list[float]:
        """``wᵢ / Σ w``."""
        return shares_of(self.weights, labels)


@hookimpl
def register_mergers(register: Register) -> None:
    """Register `soup`."""
    register("soup", Soup)
