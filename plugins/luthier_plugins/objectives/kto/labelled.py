"""Completions that are each good or bad: from labels, ratings or pairs; and completions of other prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from luthier import Branch, Codec, DataError, Finding, Row, Tree, UnusableRowError, keys_of
from luthier_plugins.objectives.kto.permutation import derangement
from luthier_toolkits.preference import EQUAL, contradictions, pair_tree

LABEL = "label"
"""Name among a tree's values: 1.0 for a desirable completion, 0.0 for another."""


def labelled_tree(row: Row, codec: Codec, threshold: float | None = None) -> Tree:
    """Return the tree of ``prompt`` and ``completion`` with its ``label``, made of ``rating`` on request.

    Args:
        row: A row.
        codec: Renders and tokenises.
        threshold: The rating from which a completion is desirable; None: the row has a label.

    Raises:
        DataError: A column is missing, or the label is none.
    """
    prompt, completion = row.fields.get("prompt"), row.fields.get("completion")
    if prompt is None or completion is None:
        has = ", ".join(row.fields) or "nothing"
        raise DataError(
            f"{row.origin}: has {has}; expected 'prompt', 'completion' and '{LABEL}'; rename with "
            "data.columns, or set objective.unpair=true for pairs of chosen and rejected"
        )
    if completion == []:
        raise UnusableRowError(row.origin, "with an empty completion")
    good = _label(row) if threshold is None else _rating(row) >= threshold
    return _with_label(codec.pair(prompt, completion, row.origin, tools=row.fields.get("tools")), good)


def labelled_sides(row: Row, codec: Codec) -> list[Tree]:
    """Return two trees of a pair: the chosen completion, desirable, and the rejected one.

    Raises:
        UnusableRowError: They are equal.
        DataError: As `luthier_toolkits.preference.pair_tree`.
    """
    pair = pair_tree(row, codec)
    if pair.branches[0] == pair.branches[1]:
        raise UnusableRowError(row.origin, EQUAL)
    return [
        _with_label(replace(pair, branches=(branch,)), good)
        for branch, good in zip(pair.branches, (True, False), strict=True)
    ]


def check_labels(trees: Sequence[Tree]) -> None:
    """Refuse rows of one label alone.

    Raises:
        DataError: All rows have the same; the first are named.
    """
    labels = {tree.values[LABEL] for tree in trees}
    if len(labels) < 2:
        rows = ", ".join(trees[place].origin for place in range(min(3, len(trees))))
        raise DataError(
            f"every row has label {bool(min(labels))} ({rows} …): both kinds are needed to learn from"
        )


def label_findings(trees: Sequence[Tree]) -> list[Finding]:
    """Return the completions that are called good in one row and bad in another."""
    seen: dict[int, tuple[float, int]] = {}
    against = []
    for place, tree in enumerate(trees):
        label, other = seen.setdefault(keys_of(tree)[0], (tree.values[LABEL], place))
        if label != tree.values[LABEL]:
            against.append(f"{trees[other].origin} and {tree.origin}")
    return [contradictions(against)] if against else []


def with_mismatched(trees: Sequence[Tree], generator: torch.Generator) -> Iterator[Tree]:
    """Yield every tree with a completion of another prompt as its second branch, each used once.

    It is cut where it would make the longest path of all longer.

    Raises:
        DataError: All rows have one prompt.
    """
    others = derangement([hash(tree.prompt) for tree in trees], generator)
    longest = max(tree.tokens for tree in trees)
    for tree, other in zip(trees, others, strict=True):
        room = max(1, longest - len(tree.prompt))
        yield replace(tree, branches=(tree.branches[0], _cut(trees[other].branches[0], room)))


def _label(row: Row) -> bool:
    label = row.fields.get(LABEL)
    if not isinstance(label, bool | int | float) or label not in (0, 1):
        raise DataError(
            f"{row.origin}: label must be true or false, got {label!r}; of ratings it is made with "
            "objective.threshold"
        )
    return bool(label)


def _rating(row: Row) -> float:
    rating = row.fields.get("rating")
    if isinstance(rating, bool) or not isinstance(rating, int | float) or not math.isfinite(rating):
        raise DataError(f"{row.origin}: rating must be a number (objective.threshold is set), got {rating!r}")
    return rating


def _with_label(tree: Tree, good: bool) -> Tree:
    return replace(tree, values={**tree.values, LABEL: float(good)})


def _cut(branch: Branch, room: int) -> Branch:
    cut = Branch(branch.ids[:room], None if branch.scored is None else branch.scored[:room])
    return cut if cut.scored_places else Branch(cut.ids)
