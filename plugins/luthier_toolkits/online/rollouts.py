"""Rollouts: the policy answers, reward models score, and some steps learn from it.

Every rollout is written to the run folder before its first step: answers and scores to read
(``rollouts/00000003.jsonl``), and the numbers to go on with. A run that is resumed in the middle of a rollout
reads it again; at its beginning it is made again from the same weights and the same seed.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from luthier.contracts import Candidate, DataSource
from luthier.data import Encoded, Sampler
from luthier.policy import Answer, Decoding, Logprobs, ModelPolicy, answers, undisturbed
from luthier.system import Processes
from luthier.text import Codec
from luthier.trees import Branch, Pack, Tree, cut
from luthier_toolkits.online.rollout import LOGPROB, REFERENCE, VALUE, Rollout
from luthier_toolkits.online.rollout_file import Record, RolloutFiles
from luthier_toolkits.rewards import Scores, Scoring

if TYPE_CHECKING:
    from luthier_toolkits.online.objective import OnlineObjective

log = logging.getLogger("luthier")


@dataclass
class Rollouts:
    """Batches of what the policy itself answers; `luthier.data.batches.Batches`.

    Attributes:
        policy: What answers and trains.
        reference: Gives log-probabilities under what the policy started as.
        objective: Says what tokens are worth.
        scoring: The reward models.
        codec: The policy's tokenizer.
        source: Who may know which answers are right.
        prompts: Trees without branches, and their rows.
        sampler: Which prompts a rollout has.
        batch_size: Prompts a step learns from.
        pack_tokens: Tokens one forward pass may hold.
        files: Where rollouts are kept.
        seed: Seed of sampling and of the order.
        processes: Each answers a part of the prompts.
    """

    policy: ModelPolicy
    reference: Callable[[Pack], Logprobs]
    objective: OnlineObjective
    scoring: Scoring
    codec: Codec
    source: DataSource
    prompts: Encoded
    sampler: Sampler
    batch_size: int
    pack_tokens: int
    files: RolloutFiles
    seed: int
    processes: Processes = field(default_factory=Processes)

    def __post_init__(self) -> None:
        """Hold no rollout yet."""
        self._number = -1
        self._trees: Sequence[Tree] = ()
        self._metrics: Mapping[str, float] = {}
        self._state: Mapping[str, float] = {}

    @property
    def repeatable(self) -> bool:
        """False: only the last batch is there."""
        return False

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one pass over the prompts."""
        return sum(self._steps(number) for number in range(self.sampler.steps_per_epoch))

    def _steps(self, number: int) -> int:
        size = len(self.sampler.batch(number))
        return self.objective.rollout_epochs * math.ceil(size / self.batch_size)

    def _place(self, step: int) -> tuple[int, int]:
        """Return the rollout that the step after `step` ones belongs to, and how many of its own are done."""
        epoch, left = divmod(step, self.steps_per_epoch)
        number = epoch * self.sampler.steps_per_epoch
        while left >= (steps := self._steps(number)):
            number, left = number + 1, left - steps
        return number, left

    def batch(self, step: int) -> list[Tree]:
        """See `luthier.data.batches.Batches`."""
        number, done = self._place(step)
        if number != self._number:
            self._hold(number, anew=done == 0)
        each = math.ceil(len(self._trees) / self.batch_size)
        turn, place = divmod(done, each)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) * 1_009 + turn)
        order = torch.randperm(len(self._trees), generator=generator).tolist()
        return [self._trees[i] for i in order[place * self.batch_size : (place + 1) * self.batch_size]]

    def metrics(self) -> Mapping[str, float]:
        """Return what is known of the rollout that the last batch is of."""
        return self._metrics

    def _hold(self, number: int, anew: bool) -> None:
        if number and self._number != number - 1:  # resumed: what the one before left is in its file
            self._state = self._read(number - 1).state
        record = self._made(number) if anew else self._read(number)
        if len(set(itertools.chain.from_iterable(record.rollout.scores))) == 1 and anew:
            log.warning(
                "rollout %d: all %d answers have the same score, so there is no signal in them to learn from",
                number, sum(map(len, record.rollout.scores)),
            )  # fmt: skip
        credited = self.objective.credit(record.rollout, self._state)
        self._number, self._trees = number, credited.trees
        self._metrics, self._state = {**record.metrics, **credited.metrics}, credited.state
        if anew and self.processes.main:
            self.files.write(number, replace(record, state=credited.state))

    def _read(self, number: int) -> Record:
        return self.processes.same(
            self.files.read(number) if self.processes.main else Record(Rollout([], [], []))
        )

    def _made(self, number: int) -> Record:
        """Answer, score and measure; every process returns the whole of it."""
        start = time.perf_counter()
        places = self.processes.share(self.sampler.batch(number))
        trees = [self.prompts.trees[place] for place in places]
        with undisturbed(self.policy.model):
            replies = self._answers(trees, number)
            answered = time.perf_counter() - start
            candidates = [self._candidates(place, own) for place, own in zip(places, replies, strict=True)]
            scored = self.scoring([candidate for own in candidates for candidate in own])
            measured = self._measured([_grown(*pair) for pair in zip(trees, replies, strict=True)])
        rollout = Rollout(
            measured,
            _split(scored.total.tolist(), replies),
            [[answer.finished for answer in own] for own in replies],
        )
        lines = list(self._lines(candidates, scored))
        parts = self.processes.gather((rollout, lines))
        whole = Rollout(*([item for part, _ in parts for item in getattr(part, name)]
                          for name in ("trees", "scores", "finished")))  # fmt: skip
        everything = [line for _, own in parts for line in own]
        seconds = {"seconds/answering": answered, "seconds/rollout": time.perf_counter() - start}
        return Record(whole, {**rollout_metrics(whole, everything), **seconds}, lines=everything)

    def _lines(self, candidates: Sequence[Sequence[Candidate]], scored: Scores) -> Iterator[dict[str, Any]]:
        """Yield what people read of every answer."""
        for place, candidate in enumerate(itertools.chain.from_iterable(candidates)):
            right = self._right(candidate)
            yield {
                "prompt": candidate.prompt,
                "completion": candidate.completion,
                "score": float(scored.total[place]),
                "scores": {name: float(part[place]) for name, part in scored.parts.items()},
                **({} if right is None else {"right": right}),
                "finished": candidate.finished,
                "tokens": candidate.tokens,
                "origin": candidate.origin,
            }

    def _right(self, candidate: Candidate) -> bool | None:
        """Return whether the row's source calls it right, if it can tell."""
        assert candidate.row is not None
        try:
            score = self.source.verify(candidate.row, candidate.completion.strip())
        except Exception:  # noqa: BLE001 - only shown here; a reward model that asks says it itself
            return None
        return None if score is None else score >= 1.0 and candidate.finished

    def _answers(self, trees: Sequence[Tree], number: int) -> list[list[Answer]]:
        objective = self.objective
        decoding = Decoding(
            objective.max_new_tokens,
            objective.generation_batch_size,
            objective.samples_per_prompt,
            temperature=1.0,
        )
        with torch.random.fork_rng():
            torch.manual_seed((self.seed * 1_000_003 + number) * 101 + self.processes.rank)
            replies = dict(answers(self.policy, self.codec, [tree.prompt for tree in trees], decoding))
        return [replies[place] for place in range(len(trees))]

    def _candidates(self, place: int, own: Sequence[Answer]) -> list[Candidate]:
        row = self.prompts.rows[place]
        prompt = row.fields["prompt"]
        return [
            Candidate(prompt, answer.after(prompt), len(answer.ids), answer.finished, row) for answer in own
        ]

    def _measured(self, trees: Sequence[Tree]) -> list[Tree]:
        """Return `trees` with what every token has before the first step; without gradients."""
        noted: dict[int, Tree] = {}
        for places in cut(trees, self.pack_tokens):
            pack = Pack.of([trees[place] for place in places], self.policy.device)
            notes = {}
            if self.objective.head:
                logprobs, values = self.policy.valued(pack)
                notes[VALUE] = values
            else:
                logprobs = self.policy.logprobs(pack)
            notes |= {LOGPROB: logprobs.values, REFERENCE: self.reference(pack).values}
            for place, tree in zip(places, pack.noted(notes), strict=True):
                noted[place] = tree
        return [noted[place] for place in range(len(trees))]


def rollout_metrics(rollout: Rollout, lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the metrics of a rollout, means over its answers; `lines` are those people read."""
    branches = [branch for tree in rollout.trees for branch in tree.branches]
    logprobs = [branch.notes[LOGPROB] for branch in branches]
    ratios = [sum(b.notes[LOGPROB]) - sum(b.notes[REFERENCE]) for b in branches]
    tokens, count = sum(map(len, logprobs)), len(branches)
    metrics = {
        "reward": sum(itertools.chain.from_iterable(rollout.scores)) / count,
        "kl": sum(ratios) / count,
        # Of its own samples, −log π of a token is an unbiased estimate of the entropy there.
        "entropy": -sum(map(sum, logprobs)) / tokens,
        "length": tokens / count,
        "finished": sum(itertools.chain.from_iterable(rollout.finished)) / count,
    }
    for name in lines[0]["scores"] if len(lines[0]["scores"]) > 1 else ():
        metrics[f"scores/{name}"] = sum(line["scores"][name] for line in lines) / count
    if all("right" in line for line in lines):
        metrics["right"] = sum(line["right"] for line in lines) / count
    return metrics


def _grown(tree: Tree, replies: Sequence[Answer]) -> Tree:
    return replace(tree, branches=tuple(Branch(answer.ids) for answer in replies))


def _split(values: Sequence[float], like: Sequence[Sequence[Any]]) -> list[list[float]]:
    remaining = iter(values)
    return [list(itertools.islice(remaining, len(own))) for own in like]
