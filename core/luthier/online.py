"""Objectives that learn from what the policy itself answers."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from luthier.codec import Codec
from luthier.data_source import Row
from luthier.errors import ConfigError, DataError
from luthier.method import option
from luthier.objective import Objective
from luthier.tree import Branch, Tree

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


@dataclass(frozen=True, kw_only=True)
class OnlineObjective(Objective):
    """Rolls out answers to prompts, has them scored, and takes some steps on them, again and again.

    Rows are prompts; `reward_models` score answers. Core owns the rollouts: see `luthier.rollouts`.
    """

    online: ClassVar[bool] = True
    branch_names: ClassVar[tuple[str, ...]] = ()

    rollout: int = option(64, "Prompts of one rollout.")
    n: int = option(1, "Answers to each prompt; the prompt is computed once for them.")
    reuse: int = option(4, "Passes over the answers of a rollout.")
    max_new_tokens: int = option(64, "Tokens an answer may have.")
    together: int = option(64, "Answers made at a time.")

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: One of them is below 1.
        """
        for name in ("rollout", "n", "reuse", "max_new_tokens", "together"):
            if getattr(self, name) < 1:
                raise ConfigError(f"objective.{name}={getattr(self, name)} must be at least 1")

    def encode(self, row: Row, codec: Codec) -> Tree:
        """Return the prompt of `row`, a tree that answers will continue.

        Raises:
            DataError: The row has none.
        """
        prompt = row.fields.get("prompt")
        if prompt is None:
            has = ", ".join(row.fields) or "nothing"
            raise DataError(f"{row.origin}: has {has}; an answer needs 'prompt'; rename with data.columns")
        return Tree(tuple(codec.prompt_ids(prompt, row.origin, row.fields.get("tools"))), (), row.origin)

    def weigh(self, tree: Tree) -> float:
        """Return the tokens of its answers."""
        return float(tree.scored_tokens)

    def fault(self, tree: Tree) -> str | None:
        """Return None: a prompt is enough."""
        return None

    @abstractmethod
    def credit(self, rollout: Rollout, state: Mapping[str, float]) -> Credited:
        """Return what each token of `rollout` is worth; the same for the same arguments.

        Args:
            rollout: What the policy answered.
            state: What the credit of the rollout before gave; empty at first.

        Raises:
            GuardError: Training should not go on.
        """
