"""Rollouts on disk: the numbers to go on with as safetensors, the answers to read as JSON lines."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from luthier.errors import LuthierError
from luthier.trees import Branch, Tree
from luthier_toolkits.online.rollout import Rollout


@dataclass(frozen=True)
class Record:
    """A rollout as it is kept.

    Attributes:
        rollout: Answers with their notes and scores.
        metrics: What was found when it was made.
        state: What its credit left for the next one.
        lines: The answers for people, a line each; not read back.
    """

    rollout: Rollout
    metrics: Mapping[str, float] = field(default_factory=dict)
    state: Mapping[str, float] = field(default_factory=dict)
    lines: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class RolloutFiles:
    """The rollouts of a run in `folder`, by number."""

    folder: Path

    def write(self, number: int, record: Record) -> None:
        """Write one, whole or not at all, and make sure that it is on the disk.

        Raises:
            LuthierError: It cannot be written.
        """
        tensors, said = _flat(record)
        numbers = self._numbers(number)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            readable = numbers.with_suffix(".jsonl")
            text = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in record.lines)
            readable.with_suffix(".part").write_text(text, encoding="utf-8")
            readable.with_suffix(".part").replace(readable)
            draft = numbers.with_suffix(".draft")
            save_file(tensors, draft, {"said": json.dumps(said)})
            with draft.open("rb") as file:
                os.fsync(file.fileno())
            draft.replace(numbers)
        except (OSError, SafetensorError) as error:
            raise LuthierError(f"{numbers}: the rollout cannot be written: {error}") from error

    def read(self, number: int) -> Record:
        """Return one that was written.

        Raises:
            LuthierError: It is not there, or damaged.
        """
        numbers = self._numbers(number)
        try:
            with safe_open(numbers, framework="pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
                said = json.loads(stored.metadata()["said"])
            return _record(tensors, said)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise LuthierError(
                f"{numbers}: the rollout that the checkpoint belongs to cannot be read: {error}; "
                "remove that checkpoint, and the run goes on from the one before it"
            ) from error

    def _numbers(self, number: int) -> Path:
        return self.folder / f"{number:08d}.safetensors"


def _flat(record: Record) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    trees = record.rollout.trees
    branches = [branch for tree in trees for branch in tree.branches]
    names = list(branches[0].notes)

    def numbers(of: Iterator[float] | Sequence[float], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(list(of), dtype=dtype)

    chain = itertools.chain.from_iterable
    tensors = {
        "prompts": numbers(chain(tree.prompt for tree in trees)),
        "prompt_lengths": numbers([len(tree.prompt) for tree in trees]),
        "answers": numbers(chain(branch.ids for branch in branches)),
        "answer_lengths": numbers([len(branch.ids) for branch in branches]),
        "answers_each": numbers([len(tree.branches) for tree in trees]),
        "scores": numbers(chain(record.rollout.scores), torch.float64),
        "finished": numbers(chain(record.rollout.finished), torch.uint8),
        **{f"note.{name}": numbers(chain(b.notes[name] for b in branches), torch.float32) for name in names},
    }
    said = {
        "origins": [tree.origin for tree in trees],
        "metrics": dict(record.metrics),
        "state": dict(record.state),
    }
    return tensors, said


def _record(tensors: Mapping[str, torch.Tensor], said: Mapping[str, Any]) -> Record:
    def cut(name: str, sizes: Sequence[int]) -> list[tuple[Any, ...]]:
        numbers = iter(tensors[name].tolist())
        return [tuple(itertools.islice(numbers, size)) for size in sizes]

    lengths: list[int] = tensors["answer_lengths"].tolist()
    each: list[int] = tensors["answers_each"].tolist()
    notes = {name.removeprefix("note."): cut(name, lengths) for name in tensors if name.startswith("note.")}
    branches = iter(
        Branch(ids, notes={name: values[place] for name, values in notes.items()})
        for place, ids in enumerate(cut("answers", lengths))
    )
    prompts = cut("prompts", tensors["prompt_lengths"].tolist())
    trees = [
        Tree(prompt, tuple(itertools.islice(branches, size)), origin)
        for prompt, size, origin in zip(prompts, each, said["origins"], strict=True)
    ]
    scores = [list(branch_scores) for branch_scores in cut("scores", each)]
    finished = [[bool(flag) for flag in flags] for flags in cut("finished", each)]
    return Record(Rollout(trees, scores, finished), said["metrics"], said["state"])
