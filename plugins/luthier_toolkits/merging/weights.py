"""The weights of models in a merge, and the mean of what agrees in sign."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from luthier import ConfigError, unknown

_NOTHING = 1e-20
"""Less than any weight that counts."""


def check_weights(weights: Mapping[str, float], labels: Sequence[str], signed: bool = True) -> None:
    """Refuse an option ``weights`` that does not fit the models.

    Args:
        weights: Label → weight.
        labels: Those of all models.
        signed: Whether a weight may be negative.

    Raises:
        ConfigError: It names none of the models, or a weight is not finite or must not be negative.
    """
    for name, weight in weights.items():
        if name not in labels:
            raise ConfigError(f"merger.weights: {unknown('model', name, labels)}")
        if not math.isfinite(weight):
            raise ConfigError(f"merger.weights.{name}={weight} must be finite")
        if weight < 0 and not signed:
            raise ConfigError(
                f"merger.weights.{name}={weight} must not be negative: an elected sign has no use for it; "
                "merger=task_arithmetic takes such weights"
            )


def weights_of(weights: Mapping[str, float], labels: Sequence[str]) -> list[float]:
    """Return the weight of every one of `labels`: that of the option ``weights``, or 1."""
    return [float(weights.get(label, 1.0)) for label in labels]


def shares_of(weights: Mapping[str, float], labels: Sequence[str]) -> list[float]:
    """Return the weights of `weights_of` divided by their sum.

    Raises:
        ConfigError: They add up to nothing.
    """
    values = weights_of(weights, labels)
    if abs(total := sum(values)) < 1e-8:
        raise ConfigError(
            f"merger.weights of {', '.join(labels)} add up to 0, and are divided by their sum; change one"
        )
    return [weight / total for weight in values]


def disjoint_mean(deltas: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return the weighted mean of the deltas that have the elected sign, element by element.

    The sign is that of the weighted sum, positive where that is zero; what is zero has no sign, and where
    none is left the mean is zero. Weights are not negative. Source: TIES, arXiv 2306.01708, section 4.1,
    steps 2 and 3.
    """
    # Products with ±1 and clamps, all in fp32: several times faster than choosing element by element or
    # than mixing types, and as exact.
    total = deltas[0] * weights[0]
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total.add_(delta, alpha=weight)
    sign = torch.ones_like(total).copysign_(total)
    total.zero_()
    count = torch.zeros_like(total)
    for delta, weight in zip(deltas, weights, strict=True):
        agreeing = (delta * sign).clamp_(min=0)
        total.add_(agreeing, alpha=weight)
        count.add_(agreeing.sign_(), alpha=weight)
    return total.mul_(sign).div_(count.clamp_(min=_NOTHING))
