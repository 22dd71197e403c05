"""Objectives on pairs: a prompt with a chosen and a rejected completion, in one tree that shares the prompt.

An objective of this kind states its loss on one number a side. Rows, packing, the reference, metrics and
what a person should know of the data are here.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from luthier.contracts import Finding, Loss, Objective, Row
from luthier.errors import ConfigError
from luthier.policy import Logprobs, Policy
from luthier.text import Codec
from luthier.trees import Pack, Tree
from luthier_toolkits.preference.pair_findings import EQUAL, pair_findings
from luthier_toolkits.preference.pair_rows import pair_tree


@dataclass(frozen=True)
class Side:
    """The chosen, or the rejected, completions of n pairs.

    Attributes:
        sums: (n,) log π(y | x), over the tokens of y alone; differentiable.
        lengths: (n,) scored tokens |y|.
        reference: (n,) log π_ref(y | x), a constant; of zeros where the objective has no reference.
    """

    sums: Tensor
    lengths: Tensor
    reference: Tensor

    @property
    def means(self) -> Tensor:
        """Log π(y | x) / |y|, (n,)."""
        return self.sums / self.lengths

    @property
    def ratios(self) -> Tensor:
        """Log π(y | x) − log π_ref(y | x), (n,)."""
        return self.sums - self.reference


class PairRows(Objective):
    """What objectives on pairs share: their rows, and what a person should know of them.

    Rows have ``prompt``, ``chosen`` and ``rejected``, each a text or messages, or whole conversations
    ``chosen`` and ``rejected``, whose shared beginning is the prompt.
    """

    branch_names: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    example_rows: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"prompt": "What is 12 + 7?", "chosen": " The answer is 19.", "rejected": " No idea"},
        {"prompt": "one two", "chosen": " three", "rejected": " four five six seven"},
        {"prompt": "The capital of France is", "chosen": " Paris", "rejected": " Rome"},
    )

    def encode(self, row: Row, codec: Codec) -> Tree:
        """Return the prompt with the chosen and the rejected completion."""
        return pair_tree(row, codec)

    def fault(self, tree: Tree) -> str | None:
        """Return why a pair says nothing: equal or empty sides."""
        chosen, rejected = tree.branches
        if not (chosen.scored_places and rejected.scored_places):
            return "with an empty side"
        return EQUAL if chosen == rejected else None

    def findings(self, trees: Sequence[Tree]) -> Sequence[Finding]:
        """Return contradictions and how much of the preference is length."""
        return pair_findings(trees)


class PairedObjective(PairRows):
    """A loss on the log-probabilities of pairs: a subclass states `pair_loss`, and `reward` where it is
    another than β times the log-ratio.
    """

    beta: float

    @abstractmethod
    def pair_loss(self, chosen: Side, rejected: Side) -> Tensor:
        """Return (n,), the loss of each pair."""

    def reward(self, side: Side) -> Tensor:
        """Return (n,), the reward the policy implies, by which it prefers one side: ``β·side.ratios``."""
        return self.beta * side.ratios

    def loss(self, policy: Policy, pack: Pack) -> Loss:
        """Return the sum of the pairs' losses; its weight is their number."""
        logprobs = policy.logprobs(pack)
        chosen, rejected = self._sides(policy, pack, logprobs)
        losses = self.pair_loss(chosen, rejected)
        # Counted on the host: nothing here asks the device for a number.
        nll = -chosen.sums.detach().sum(), float(sum(logprobs.lengths[0::2]))
        return Loss(losses.sum(), len(losses), {"nll": nll, **self._metrics(chosen, rejected)})

    def _sides(self, policy: Policy, pack: Pack, logprobs: Logprobs) -> tuple[Side, Side]:
        sums = logprobs.sums()
        lengths = torch.tensor(logprobs.lengths, dtype=sums.dtype, device=sums.device)
        reference = policy.reference(pack) if self.needs_reference else torch.zeros_like(sums)
        chosen, rejected = (Side(sums[k::2], lengths[k::2], reference[k::2]) for k in (0, 1))
        return chosen, rejected

    @torch.no_grad()
    def _metrics(self, chosen: Side, rejected: Side) -> dict[str, tuple[Tensor, float]]:
        rewards = self.reward(chosen), self.reward(rejected)
        values = preference_metrics(rewards, (chosen.lengths, rejected.lengths)) | {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "logprobs/chosen": chosen.sums,
            "logprobs/rejected": rejected.sums,
        }
        return {name: (value.sum(), float(len(value))) for name, value in values.items()}


def preference_metrics(scores: tuple[Tensor, Tensor], lengths: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Return what the scores of chosen and rejected sides say of n pairs, (n,) each, by name."""
    margins = scores[0] - scores[1]
    longer = torch.where(margins > 0, *lengths)
    return {
        # A tie, as all pairs are before the first step, is half right.
        "pair_accuracy": 0.5 + 0.5 * margins.sign(),
        "margin": margins,
        "length/chosen": lengths[0],
        "length/rejected": lengths[1],
        "length/preferred": torch.where(margins == 0, (lengths[0] + lengths[1]) / 2, longer),
    }


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 − eˣ) of x < 0 without cancellation (Mächler 2012); x is kept off 0, where it is −∞."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def check_positive(**options: float) -> None:
    """Refuse options that are not above zero and finite.

    Raises:
        ConfigError: The first of them that is not.
    """
    for name, value in options.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"objective.{name}={value} must be positive")


def check_share(**options: float) -> None:
    """Refuse options that are not in [0, 0.5), the shares of labels that may be wrong.

    Raises:
        ConfigError: The first of them that is not.
    """
    for name, value in options.items():
        if not 0 <= value < 0.5:
            raise ConfigError(f"objective.{name}={value} must be in [0, 0.5)")
