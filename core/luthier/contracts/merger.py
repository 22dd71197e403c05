"""Mergers: one tensor out of the same tensor of several models."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from luthier.contracts.method import Method

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
        statistics: What `Merger.collect_statistics` returned; None for a merger that needs none.
    """

    name: str
    labels: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]
    base: torch.Tensor | None = None
    start: int = 0
    statistics: Any = None

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
            its statistics. Others get whole tensors, which must fit into memory.
        statistics_over: What must be seen whole before a group is merged: ``nothing``, a ``tensor`` or the
            ``model``.
        workspace: Elements of fp32 that the statistics of one model take beside the tensors themselves.
    """

    workspace: ClassVar[int] = 0

    needs_base: ClassVar[bool] = False
    least_inputs: ClassVar[int] = 1
    most_inputs: ClassVar[int | None] = None
    symmetric: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True

    @property
    def statistics_over(self) -> Scope:
        """See the class."""
        return "nothing"

    def check(self, labels: Sequence[str]) -> None:
        """Refuse options that do not fit the models, before anything is read.

        Raises:
            ConfigError: They do not.
        """

    def collect_statistics(self, groups: Groups) -> Any:
        """Look at a tensor or a model as `statistics_over` says, and return what `Group.statistics` shall be.

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
