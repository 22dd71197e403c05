"""Mergers: one tensor out of the same tensor of several models."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from luthier.errors import ConfigError, unknown
from luthier.method import Method

_NOTHING = 1e-20
"""Less than any weight that counts."""
Scope = Literal["nothing", "tensor", "model"]


@dataclass(frozen=True)
class Group:
    """The same elements of one tensor from every model: a whole tensor, or a run of its elements.

    Attributes:
        name: The tensor's name, for seeds and messages.
        labels: What the models are called, in the order of `tensors`.
        tensors: Theirs, float32 and of one shape; shared, never written to.
        base: The base model's; None unless the merger `needs_base`.
        start: Place of the first element in the whole tensor, row by row.
        surveyed: What `Merger.survey` returned; None for a merger that surveys nothing.
    """

    name: str
    labels: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]
    base: torch.Tensor | None = None
    start: int = 0
    surveyed: Any = None

    def deltas(self) -> list[torch.Tensor]:
        """Return τᵢ = θᵢ − θ_base, tensors of their own."""
        assert self.base is not None
        return [tensor - self.base for tensor in self.tensors]

    @property
    def place(self) -> tuple[str, int]:
        """What tells this group from the others of a model."""
        return self.name, self.start


Groups = Callable[[], Iterable[Group]]
"""Gives the groups of a tensor or of a model; may be called more than once."""


class Merger(Method):
    """Merges tensor by tensor; large tensors a run of elements at a time.

    Attributes:
        needs_base: The method works on differences to a base model, which must then be given.
        least_inputs: How many models it needs at least.
        most_inputs: How many it takes at most; None: any number.
        symmetric: The order of the models is without effect.
        elementwise: An element of the result depends on the same element of the models alone, and on what
            was surveyed. Others get whole tensors, which must fit into memory.
        surveys: What must be seen whole before a group of it is merged: ``nothing``, a ``tensor`` or the
            ``model``.
    """

    needs_base: ClassVar[bool] = False
    least_inputs: ClassVar[int] = 1
    most_inputs: ClassVar[int | None] = None
    symmetric: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True

    @property
    def surveys(self) -> Scope:
        """See the class."""
        return "nothing"

    def check(self, labels: Sequence[str]) -> None:
        """Refuse options that do not fit the models, before anything is read.

        Raises:
            ConfigError: They do not.
        """

    def survey(self, groups: Groups) -> Any:
        """Look at a tensor or a model as `surveys` says, and return what `Group.surveyed` shall be.

        Args:
            groups: All groups, in an order that does not depend on how the models are stored.
        """
        return None

    @abstractmethod
    def merge(self, group: Group) -> torch.Tensor:
        """Return the merged elements, float32 and of the shape of the group's."""

    def coefficients(self, labels: Sequence[str]) -> list[float] | None:
        """Return cᵢ of a merge that is θ_base + Σ cᵢ·τᵢ, whatever the models; None of any other.

        With them adapters merge exactly and stay of low rank.
        """
        return None


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
    found = weights_of(weights, labels)
    if abs(total := sum(found)) < 1e-8:
        raise ConfigError(
            f"merger.weights of {', '.join(labels)} add up to 0, and are divided by their sum; change one"
        )
    return [weight / total for weight in found]


def agreed_mean(deltas: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
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
