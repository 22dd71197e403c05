"""Kahneman-Tversky optimisation: completions that are each good or bad, without pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from luthier import (
    Branch,
    Codec,
    DataError,
    Loss,
    Objective,
    Pack,
    Policy,
    Register,
    Row,
    Tree,
    check_positive,
    derangement,
    hookimpl,
    option,
    pair_tree,
)


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
        check_positive(
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )

    def encode(self, row: Row, codec: Codec) -> Tree | Sequence[Tree]:
        """Return the prompt with its completion, and the label among its values; two such trees of a pair.

        Raises:
            DataError: A column is missing or the label is none.
        """
        if self.unpair:
            pair = pair_tree(row, codec)
            return [_labelled(replace(pair, branches=(branch,)), good)
                    for branch, good in zip(pair.branches, (True, False), strict=True)]  # fmt: skip
        if row.fields.get("prompt") is None or row.fields.get("completion") is None:
            has = ", ".join(row.fields) or "nothing"
            raise DataError(
                f"{row.origin}: has {has}; kto needs 'prompt', 'completion' and 'label'; rename with "
                "data.columns, or set objective.unpair=true for pairs of chosen and rejected"
            )
        tree = codec.pair(
            row.fields["prompt"], row.fields["completion"], row.origin, tools=row.fields.get("tools")
        )
        return _labelled(tree, self._label(row))

    def _label(self, row: Row) -> bool:
        if self.threshold is not None:
            rating = row.fields.get("rating")
            if isinstance(rating, bool) or not isinstance(rating, int | float):
                raise DataError(
                    f"{row.origin}: rating must be a number (objective.threshold is set), got {rating!r}"
                )
            return rating >= self.threshold
        label = row.fields.get("label")
        if label not in (True, False):  # 1 and 0 are equal to them
            raise DataError(
                f"{row.origin}: label must be true or false, got {label!r}; of ratings it is made with "
                "objective.threshold"
            )
        return bool(label)

    def complete(self, trees: Sequence[Tree], generator: torch.Generator) -> Iterable[Tree]:
        """Give every tree the completion of another prompt, cut where it would be the longest path of all.

        Raises:
            DataError: All rows have one label, or one prompt.
        """
        labels = {tree.values["label"] for tree in trees}
        if len(labels) < 2:
            only, rows = bool(next(iter(labels))), ", ".join(tree.origin for tree in trees[:3])
            raise DataError(
                f"all {len(trees):,} rows have label {only} ({rows} …): kto learns from both kinds"
            )
        others = derangement([hash(tree.prompt) for tree in trees], generator)
        longest = max(tree.tokens for tree in trees)
        return (
            _with_other(tree, trees[other].branches[0], longest)
            for tree, other in zip(trees, others, strict=True)
        )

    def pool(self, policy: Policy, pack: Pack) -> Mapping[str, tuple[float, float]]:
        """Return the sum of log π/π_ref over the completions of other prompts, and their number."""
        others = pack.only(1)
        ratios = policy.logprobs(others).sums() - policy.reference(others)
        return {"kl": (float(ratios.sum()), float(len(ratios)))}

    def loss(self, policy: Policy, pack: Pack) -> Loss:
        """Return the sum of the rows' losses; its weight is their number."""
        seen = pack if pack.pooled is None else pack.only(0)
        ratios = policy.logprobs(seen).sums() - policy.reference(seen)
        if pack.pooled is None:
            ratios, kl = ratios[0::2], ratios[1::2].detach().mean()
        else:
            kl = ratios.new_tensor(pack.pooled["kl"])
        good = torch.tensor([tree.values["label"] > 0 for tree in pack.trees], device=ratios.device)
        above = self.beta * (ratios - kl.clamp(min=0))
        losses = torch.where(
            good,
            self.desirable_weight * torch.sigmoid(-above),
            self.undesirable_weight * torch.sigmoid(above),
        )
        return Loss(losses.sum(), weight=len(losses), metrics=self._metrics(seen, ratios, above, good, kl))

    @torch.no_grad()
    def _metrics(
        self, seen: Pack, ratios: Tensor, above: Tensor, good: Tensor, kl: Tensor
    ) -> dict[str, tuple[Tensor, float]]:
        rewards, rows, desirable = self.beta * ratios, float(len(ratios)), float(good.sum())
        lengths = torch.tensor(
            [len(tree.branches[0].scored_places) for tree in seen.trees], device=ratios.device
        )
        right = (above > 0) == good
        return {
            "label_accuracy": (right.float().sum(), rows),
            "kl": (kl * rows, rows),
            "rewards/desirable": (rewards[good].sum(), desirable),
            "rewards/undesirable": (rewards[~good].sum(), rows - desirable),
            "length/desirable": (lengths[good].sum(), desirable),
            "length/undesirable": (lengths[~good].sum(), rows - desirable),
        }


def _labelled(tree: Tree, good: bool) -> Tree:
    return replace(tree, values={**tree.values, "label": float(good)})


def _with_other(tree: Tree, other: Branch, longest: int) -> Tree:
    room = max(1, longest - len(tree.prompt))
    cut = Branch(other.ids[:room], None if other.scored is None else other.scored[:room])
    return replace(tree, branches=(tree.branches[0], cut if cut.scored_places else Branch(cut.ids)))


@hookimpl
def register_objectives(register: Register) -> None:
    """Register `kto`."""
    register("kto", KTO)
