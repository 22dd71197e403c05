"""Objectives: how a row becomes a token tree, and the loss on packs of trees."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from luthier.codec import Codec
from luthier.data_source import Row
from luthier.method import Method
from luthier.policy import Policy
from luthier.tree import Pack, Tree


@dataclass(frozen=True)
class Loss:
    """A sum and its weight, never a mean: only the engine divides, once a step.

    Attributes:
        total: Scalar tensor, the summed loss; differentiable.
        weight: What the sum is divided by, e.g. the number of supervised tokens or of pairs.
        metrics: ``name → (sum, weight)``, averaged likewise over everything between two logging points.
    """

    total: torch.Tensor
    weight: float
    metrics: Mapping[str, tuple[torch.Tensor, float]] = field(default_factory=dict)


class Objective(Method):
    """Turns rows into trees and packs of trees into a loss.

    Attributes:
        needs_reference: The loss compares with the policy as it was before training.
        holds: Other models it keeps in memory, by name: ``copy`` (of the whole base) or ``head`` (one value a
            position); the reference is no part of it. What a plan counts.
        branch_names: What the branches of its trees are, in order, for people, e.g. chosen and rejected.
        example_rows: Rows it takes, as a data file holds them: what `luthier.testing` tries it with. Empty:
            ``prompt`` and ``completion``.
    """

    needs_reference: ClassVar[bool] = False
    holds: ClassVar[Mapping[str, str]] = {}
    branch_names: ClassVar[tuple[str, ...]] = ()
    example_rows: ClassVar[Sequence[Mapping[str, Any]]] = ()

    @abstractmethod
    def encode(self, row: Row, codec: Codec) -> Tree:
        """Return the tree of `row`.

        Raises:
            DataError: The row lacks what the objective needs; the message names its origin.
        """

    @abstractmethod
    def loss(self, policy: Policy, pack: Pack) -> Loss:
        """Return the summed loss of the trees in `pack`."""
