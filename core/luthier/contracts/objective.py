"""Objectives: how a row becomes a token tree, and the loss on packs of trees."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from luthier.contracts.method import Method

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from luthier.contracts.data_source import Row
    from luthier.data import Batches
    from luthier.engine import TrainingRun
    from luthier.evaluation import Evaluator
    from luthier.policy import Policy
    from luthier.runs import Sample
    from luthier.system import Processes
    from luthier.text import Codec
    from luthier.trees import Pack, Tree


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


@dataclass(frozen=True)
class Finding:
    """Something about a data set that a person should know before the first step.

    Attributes:
        text: One line, with numbers and the first rows it is about.
        refusable: ``unusable=refuse`` stops the run because of it.
    """

    text: str
    refusable: bool = False


@dataclass(frozen=True)
class Measured:
    """Held-out quality.

    Attributes:
        loss: Mean over the held-out rows.
        perplexity: Of a supervised token, where there are such.
        metrics: By name.
        samples: Answers to the held-out prompts, if there were any.
    """

    loss: float
    perplexity: float | None
    metrics: Mapping[str, float]
    samples: Sequence[Sample] = ()


class Objective(Method):
    """Turns rows into trees and packs of trees into a loss.

    Attributes:
        needs_reference: The loss asks `Policy.reference` what the policy was before training, or what another
            checkpoint is; it is measured once for every completion.
        head: The kind of score head that `Policy.scores` asks and that trains beside what else does:
            ``sequence`` or ``token``, saved as transformers' class for it, or ``value``, never saved.
        pools: The loss needs something about all of a step's trees: see `pool`.
        keeps_rows: Its batches need the rows themselves besides their trees.
        takes_auxiliary: Its trees have completions that an auxiliary objective can learn from.
        holds: Other models it keeps in memory, by name: ``copy`` (of the whole base) or ``head`` (one value a
            position); the reference is no part of it. What a plan counts.
        branch_names: What the branches of its trees are, in order, for people, e.g. chosen and rejected.
        example_rows: Rows it takes, as a data file holds them: what `luthier.testing` tries it with. Empty:
            ``prompt`` and ``completion``.
    """

    needs_reference: ClassVar[bool] = False
    head: ClassVar[str | None] = None
    pools: ClassVar[bool] = False
    keeps_rows: ClassVar[bool] = False
    takes_auxiliary: ClassVar[bool] = True
    holds: ClassVar[Mapping[str, str]] = {}
    branch_names: ClassVar[tuple[str, ...]] = ()
    example_rows: ClassVar[Sequence[Mapping[str, Any]]] = ()

    @abstractmethod
    def encode(self, row: Row, codec: Codec) -> Tree | Sequence[Tree]:
        """Return the tree of `row`, or several.

        Raises:
            UnusableRowError: The row is well formed but nothing can be learned from it.
            DataError: The row lacks what the objective needs; the message names its origin.
        """

    @abstractmethod
    def loss(self, policy: Policy, pack: Pack) -> Loss:
        """Return the summed loss of the trees in `pack`."""

    def check_run(self, config: DictConfig, processes: Processes) -> None:
        """Refuse a training run that it cannot have, before anything is loaded.

        Raises:
            ConfigError: With what to choose instead.
        """

    def check_evaluation(self, name: str) -> None:
        """Refuse to be measured by itself, where that is possible only while it trains; `name` is its own.

        Raises:
            ConfigError: With what to choose instead.
        """

    def batches(self, run: TrainingRun) -> Batches:
        """Return where the trees of every step come from: the rows, unless a subclass says otherwise.

        Called once, when the model is prepared and nothing is trained yet.

        Raises:
            LuthierError: There can be none.
        """
        return run.row_batches()

    def evaluate(self, evaluator: Evaluator, answer: bool) -> Measured:
        """Return what its held-out quality is: the loss and, with `answer`, answers to the prompts.

        Every process calls it, with the model in eval mode and whole; each measures its part, and all return
        the whole.
        """
        return evaluator.loss_and_answers(answer)

    def trial(self, trees: Sequence[Tree]) -> Sequence[Tree]:
        """Return `trees` with everything that `loss` reads, as `luthier.testing` tries it."""
        return trees

    def weigh(self, tree: Tree) -> float:
        """Return what `tree` adds to `Loss.weight`; what objectives are combined by."""
        return 1.0

    def fault(self, tree: Tree) -> str | None:
        """Return why nothing can be learned from `tree`, as it was cut to fit; None: something can."""
        return None if tree.scored_tokens else "without a supervised token"

    def imitable(self, tree: Tree) -> bool:
        """Whether the first branch of `tree` is one that an objective beside this one may teach."""
        return True

    def check(self, trees: Sequence[Tree]) -> None:
        """Refuse data to train on that nothing can be learned from as a whole.

        Raises:
            DataError: With the rows it is about.
        """

    def complete(self, trees: Sequence[Tree], generator: torch.Generator) -> Iterable[Tree]:
        """Return `trees` with what they need of each other, one for each and in order.

        Raises:
            DataError: There is nothing to complete them with.
        """
        return trees

    def summarise(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """Return the metrics that follow from the `means` of those that `loss` gave: correlations, F1."""
        return means

    def draw(self, metrics: Mapping[str, float], folder: Path) -> None:
        """Draw pictures of held-out `metrics` to `folder`, if there is something to see."""

    def findings(self, trees: Sequence[Tree]) -> Sequence[Finding]:
        """Return what a person should know of the data before the first step."""
        return ()

    def pool(self, policy: Policy, pack: Pack) -> Mapping[str, tuple[float, float]]:
        """Return sums and weights by name, whose quotients over a step `Pack.pooled` gives to every loss.

        Called for every pack of a step, without gradients, where `pools` is set and there are several packs;
        a pack that is the whole step has no `Pack.pooled`, and `loss` finds the same in itself.
        """
        return {}
