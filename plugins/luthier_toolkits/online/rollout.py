"""Answers of a policy, scored, and what each of their tokens is worth."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from luthier import Branch, Tree

LOGPROB, REFERENCE, VALUE = "logprob", "reference", "value"
"""What a branch of a rollout has noted of every token, before the first step: log π and log π_ref of the
token, and what the value head says at the place that predicts it (where the objective has one)."""


@dataclass(frozen=True)
class Rollout:
    """Answers of the policy to some prompts.

    Attributes:
        trees: A tree a prompt, its answers the branches, with the notes `LOGPROB`, `REFERENCE`, `VALUE`.
        scores: What the reward models give every answer, tree by tree.
        finished: Whether each came to an end by itself.
    """

    trees: Sequence[Tree]
    scores: Sequence[Sequence[float]]
    finished: Sequence[Sequence[bool]]

    def notes(self, name: str) -> list[Tensor]:
        """Return what every answer has noted as `name`, (T,) float32 of its T tokens."""
        return [torch.tensor(branch.notes[name]) for tree in self.trees for branch in tree.branches]

    def noted(self, notes: Mapping[str, Sequence[Tensor]]) -> list[Tree]:
        """Return the trees with `notes` by name, (T,) of every answer in order, beside their own."""
        place, trees = itertools.count(), []
        for tree in self.trees:
            branches = tuple(_noted(branch, notes, next(place)) for branch in tree.branches)
            trees.append(replace(tree, branches=branches))
        return trees


def _noted(branch: Branch, notes: Mapping[str, Sequence[Tensor]], place: int) -> Branch:
    own = {name: tuple(values[place].tolist()) for name, values in notes.items()}
    return replace(branch, notes={**branch.notes, **own})


@dataclass(frozen=True)
class Credited:
    """A rollout with what each of its tokens is worth.

    Attributes:
        trees: The same trees, with the notes that the loss reads.
        metrics: What is worth knowing of it.
        state: Numbers that the next rollout needs; a checkpoint keeps them.
    """

    trees: Sequence[Tree]
    metrics: Mapping[str, float] = field(default_factory=dict)
    state: Mapping[str, float] = field(default_factory=dict)


def made_up(trees: Sequence[Tree]) -> Rollout:
    """Return made-up answers to prompts, about as likely as a small model without training finds them."""
    generator, grown = torch.Generator().manual_seed(3), []
    for tree in trees:
        branches = []
        for length in (4, 2):
            drawn = {name: torch.randn(length, generator=generator) for name in (LOGPROB, REFERENCE, VALUE)}
            drawn[LOGPROB], drawn[REFERENCE] = 0.1 * drawn[LOGPROB] - 5.5, 0.1 * drawn[REFERENCE] - 5.5
            ids = torch.randint(3, 250, (length,), generator=generator).tolist()
            notes = {name: tuple(values.tolist()) for name, values in drawn.items()}
            branches.append(Branch(tuple(ids), notes=notes))
        grown.append(replace(tree, branches=tuple(branches)))
    scores = [[float(2 * place), float(place % 2) - 1] for place in range(len(grown))]
    return Rollout(grown, scores, [[True, False] for _ in grown])
