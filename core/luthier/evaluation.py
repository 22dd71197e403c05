"""Held-out quality: loss and perplexity over trees, and answers that a data source verifies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from luthier.codec import Codec
from luthier.data import Encoded
from luthier.data_source import DataSource, Row
from luthier.generation import Answer, Decoding, answers
from luthier.meter import Meter
from luthier.objective import Objective
from luthier.parallel import Processes
from luthier.policy import Policy
from luthier.pooling import pooled
from luthier.report import EvaluationReport, Sample
from luthier.reward_model import Candidate
from luthier.score_head import TASKS
from luthier.scoring import Scoring
from luthier.settings import EvaluationConfig
from luthier.tree import Pack, cut


@dataclass(frozen=True)
class Evaluator:
    """Measures a policy on held-out rows; holds no state between calls."""

    policy: Policy
    objective: Objective
    codec: Codec
    source: DataSource
    held_out: Encoded
    settings: EvaluationConfig
    pack_tokens: int
    processes: Processes = field(default_factory=Processes)
    scoring: Scoring | None = None

    def report(self, step: int, answer: bool) -> EvaluationReport:
        """Return the held-out loss and, with `answer`, the share of prompts answered right.

        Every process must call it; each measures its part, all return the whole.
        """
        self.policy.model.eval()
        with self.processes.whole(self.policy):
            if self.objective.online:
                loss, perplexity, metrics, samples = self._rewarded()
            else:
                loss, perplexity, metrics = self._loss()
                speaks = self.objective.head not in TASKS  # a reward model answers nothing
                samples = self._answers() if answer and speaks and self.settings.generate else []
        scores = [sample.score for sample in samples if sample.score is not None]
        return EvaluationReport(
            step=step,
            loss=loss,
            perplexity=perplexity,
            # Partial credit is not a right answer.
            accuracy=sum(score >= 1.0 for score in scores) / len(scores) if scores else None,
            rows=len(self.held_out),
            scored=len(scores),
            samples=samples,
            metrics=metrics,
        )

    @torch.no_grad()
    def _loss(self) -> tuple[float, float | None, dict[str, float]]:
        """Return the mean objective loss, the perplexity of a supervised token, and the other metrics."""
        trees, meter = self.held_out.trees, Meter()
        packs = [[trees[i] for i in indices] for indices in cut(trees, self.pack_tokens)]
        known = pooled(self.policy, self.objective, packs, self.processes)
        for pack in self.processes.share(packs):
            meter.add(self.objective.loss(self.policy, Pack.of(pack, self.policy.device, known)))
        metrics = meter.drain(self.processes)
        loss = metrics.pop("loss")
        nll = metrics.pop("nll", None if self.objective.head else loss)
        # exp of a float above 709 overflows, and JSON has no infinity.
        perplexity = None if nll is None else math.exp(min(nll, 700.0))
        return loss, perplexity, dict(self.objective.summarise(metrics))

    def _rewarded(self) -> tuple[float, None, dict[str, float], list[Sample]]:
        """Answer greedily and have the reward models score it; less reward is more loss."""
        rows = self._prompted()
        mine = self.processes.share(range(len(rows)))
        told = self._told([rows[i] for i in mine])
        found = [
            Candidate(
                rows[i].fields["prompt"],
                one.after(rows[i].fields["prompt"]),
                len(one.ids),
                one.finished,
                rows[i],
            )
            for i, one in zip(mine, told, strict=True)
        ]
        assert self.scoring is not None
        rewards = self.scoring(found).total.tolist()
        samples = {i: self._sample(rows[i], one.said) for i, one in zip(mine, told, strict=True)}
        parts = self.processes.gather(
            (samples, rewards, [one.finished for one in told], [one.tokens for one in found])
        )
        everyones = {i: sample for part in parts for i, sample in part[0].items()}
        means = [sum(x for part in parts for x in part[place]) / len(rows) for place in (1, 2, 3)]
        metrics = dict(zip(("reward", "finished", "length"), means, strict=True))
        return -metrics["reward"], None, metrics, [everyones[i] for i in range(len(rows))]

    def _answers(self) -> list[Sample]:
        rows = self._prompted()
        mine = self.processes.share(range(len(rows)))
        told = self._told([rows[i] for i in mine])
        samples = {i: self._sample(rows[i], one.said) for i, one in zip(mine, told, strict=True)}
        everyones = {i: sample for part in self.processes.gather(samples) for i, sample in part.items()}
        return [everyones[i] for i in range(len(rows))]

    def _prompted(self) -> list[Row]:
        return [row for row in self.held_out.rows if row.fields.get("prompt") is not None]

    def _told(self, rows: Sequence[Row]) -> list[Answer]:
        """Answer the prompts of `rows` greedily."""
        prompts = [
            self.codec.prompt_ids(row.fields["prompt"], row.origin, row.fields.get("tools")) for row in rows
        ]
        return greedy(self.policy, self.codec, prompts, self.settings)

    def _sample(self, row: Row, answer: str) -> Sample:
        return Sample(
            origin=row.origin,
            prompt=plain_text(row.fields["prompt"]),
            answer=answer,
            expected=plain_text(row.fields.get("answer", row.fields.get("completion", ""))),
            score=self.source.verify(row, answer),
        )


def greedy(
    policy: Policy, codec: Codec, prompts: Sequence[Sequence[int]], settings: EvaluationConfig
) -> list[Answer]:
    """Answer `prompts` with the likeliest tokens, and return the answers in order."""
    found = dict(answers(policy, codec, prompts, Decoding(settings.max_new_tokens, settings.batch_size)))
    return [found[place][0] for place in range(len(prompts))]


def generate(
    policy: Policy, codec: Codec, prompts: Sequence[Sequence[int]], settings: EvaluationConfig
) -> list[str]:
    """Answer `prompts` greedily and return the texts, in order."""
    return [one.said for one in greedy(policy, codec, prompts, settings)]


def plain_text(value: object) -> str:
    """Return a prompt or completion as text: messages are joined, system messages left out."""
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence):  # an answer that is a number
        return str(value)
    return "\n".join(
        str(message.get("content") or "") for message in value if message.get("role") != "system"
    )
