"""Kahneman-Tversky optimisation: completions that are each good or bad, without pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from luthier import (
    Codec,
    ConfigError,
    Finding,
    Loss,
    Objective,
    Pack,
    Policy,
    Register,
    Row,
    Tree,
    hookimpl,
    option,
)
from luthier_plugins.objectives.kto.labelled import (
    check_labels,
    label_findings,
    labelled_sides,
    labelled_tree,
    with_mismatched,
)
from luthier_toolkits.preference import check_positive


@dataclass(frozen=True)
class KTO(Objective):
    """``λ_D (1 − σ(β(r − z)))`` of a desirable completion, ``λ_U (1 − σ(β(z − r)))`` of another.

    r = log π/π_ref of the completion; z = max(0, mean of log π/π_ref of completions of *other* prompts), an
    estimate of the KL divergence, over the whole optimiser step and without a gradient. Each row's other
    completion is drawn once, from all of the data.

    A row has ``prompt``, ``completion`` and ``label``; or ``rating``, with `threshold`; or, with `unpair`,
    ``chosen`` and ``rejected``.
    """

    source: ClassVar[str] = "Ethayarajh et al. 2024, arXiv 2402.01306, equations 7 and 8, section 4.1"
    needs_reference: ClassVar[bool] = True
    pools: ClassVar[bool] = True
    branch_names: ClassVar[tuple[str, ...]] = ("completion", "of another prompt")
    example_rows: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"prompt": "What is 12 + 7?", "completion": " The answer is 19.", "label": True},
        {"prompt": "one two", "completion": " four", "label": False},
        {"prompt": "The capital of France is", "completion": " Paris", "label": True},
    )

    beta: float = option(0.1, "β: how much a step away from the reference costs.")
    desirable_weight: float = option(1.0, "λ_D: weight of desirable completions.")
    undesirable_weight: float = option(1.0, "λ_U: weight of the others; keep λ_D·n_D / λ_U·n_U in [1, 3/2].")
    threshold: float | None = option(
        None, "Rating from which a completion is desirable; null: rows have label."
    )
    unpair: bool = option(False, "Make two rows, a desirable and an undesirable one, of every pair.")

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A value that cannot train.
        """
        check_positive(beta=self.beta, desirable_weight=self.desirable_weight)
        check_positive(undesirable_weight=self.undesirable_weight)
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ConfigError(f"objective.threshold={self.threshold} must be finite")
        if self.threshold is not None and self.unpair:
            raise ConfigError("objective.unpair takes pairs and objective.threshold ratings: set one of them")

    def encode(self, row: Row, codec: Codec) -> Tree | Sequence[Tree]:
        """Return the prompt with its completion, and the label among its values; two such trees of a pair.

        Raises:
            DataError: A column is missing or the label is none.
        """
        return labelled_sides(row, codec) if self.unpair else labelled_tree(row, codec, self.threshold)

    def imitable(self, tree: Tree) -> bool:
        """Whether the completion is desirable."""
        return tree.values["label"] > 0

    def check(self, trees: Sequence[Tree]) -> None:
        """Refuse rows of one label alone, with a `DataError`."""
        check_labels(trees)

    def findings(self, trees: Sequence[Tree]) -> Sequence[Finding]:
        """Return the completions that have both labels."""
        return label_findings(trees)

    def complete(self, trees: Sequence[Tree], generator: torch.Generator) -> Iterable[Tree]:
        """Give every tree the completion of another prompt; DataError if there is one prompt."""
        return with_mismatched(trees, generator)

    def pool(self, policy: Policy, pack: Pack) -> Mapping[str, tuple[float, float]]:
        """Return the sum of log π/π_ref over the completions of other prompts, and their number."""
        others = pack.only(1)
        ratios = policy.logprobs(others).sums() - policy.reference(others)
        return {"kl": (float(ratios.sum()), float(len(ratios)))}

    def loss(self, policy: Policy, pack: Pack) -> Loss:
        """Return the sum of the rows' losses; its weight is their number."""
        seen = pack if pack.pooled is None else pack.only(0)
        logprobs = policy.logprobs(seen).sums()
        ratios = logprobs - policy.reference(seen)
        if pack.pooled is None:
            logprobs = logprobs[0::2]
            ratios, kl = ratios[0::2], ratios[1::2].detach().mean()
        else:
            kl = ratios.new_tensor(pack.pooled["kl"])
        good = torch.tensor([self.imitable(tree) for tree in pack.trees], device=ratios.device)
        above = self.beta * (ratios - kl.clamp(min=0))
        missed, liked = torch.sigmoid(-above), torch.sigmoid(above)
        losses = torch.where(good, self.desirable_weight * missed, self.undesirable_weight * liked)
        metrics = self._metrics(seen, (logprobs.detach(), ratios.detach(), above.detach()), good, kl)
        return Loss(losses.sum(), len(losses), metrics)

    def _metrics(
        self, seen: Pack, values: tuple[Tensor, Tensor, Tensor], good: Tensor, kl: Tensor
    ) -> dict[str, tuple[Tensor, float]]:
        logprobs, ratios, above = values
        rows = float(len(seen.trees))
        desirable = float(sum(map(self.imitable, seen.trees)))  # counted on the host, like the lengths
        lengths = ratios.new_tensor([len(tree.branches[0].scored_places) for tree in seen.trees])
        metrics = {"label_accuracy": (((above > 0) == good).sum(), rows), "kl": (kl * rows, rows)}
        for kind, mine, count in (("desirable", good, desirable), ("undesirable", ~good, rows - desirable)):
            metrics[f"rewards/{kind}"] = (self.beta * ratios * mine).sum(), count
            metrics[f"logprobs/{kind}"] = (logprobs * mine).sum(), count
            metrics[f"length/{kind}"] = (lengths * mine).sum(), count
        return metrics

    def summarise(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """Return the metrics with the margin between the rewards of the two kinds."""
        good, bad = means.get("rewards/desirable"), means.get("rewards/undesirable")
        return means if good is None or bad is None else {**means, "margin": good - bad}


@hookimpl
def register_objectives(register: Register) -> None:
    """Register `kto`."""
    register("kto", KTO)
