"""Held-out quality: loss and perplexity over trees, and answers that a data source verifies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from luthier.contracts import DataSource, Measured, Objective, Row
from luthier.data import Batches, Encoded
from luthier.engine import Monitor, pooled
from luthier.evaluation.options import EvaluationConfig
from luthier.models import TASKS
from luthier.policy import Answer, Decoding, ModelPolicy, answers
from luthier.runs import EvaluationReport, Sample
from luthier.system import Processes
from luthier.text import Codec
from luthier.trees import Pack, cut


@dataclass(frozen=True)
class Evaluator:
    """Measures a policy on held-out rows; holds no state between calls.

    Attributes:
        batches: Where the trees of training come from; None where nothing trains.
    """

    policy: ModelPolicy
    objective: Objective
    codec: Codec
    source: DataSource
    held_out: Encoded
    settings: EvaluationConfig
    pack_tokens: int
    processes: Processes = field(default_factory=Processes)
    batches: Batches | None = None

    def report(self, step: int, answer: bool) -> EvaluationReport:
        """Return the held-out loss and, with `answer`, the share of prompts answered right.

        Every process must call it; each measures its part, all return the whole.
        """
        self.policy.model.eval()
        with self.processes.whole(self.policy):
            measured = self.objective.evaluate(self, answer)
        scores = [sample.score for sample in measured.samples if sample.score is not None]
        return EvaluationReport(
            step=step,
            loss=measured.loss,
            perplexity=measured.perplexity,
            # Partial credit is not a right answer.
            accuracy=sum(score >= 1.0 for score in scores) / len(scores) if scores else None,
            rows=len(self.held_out),
            scored=len(scores),
            samples=list(measured.samples),
            metrics=dict(measured.metrics),
        )

    def loss_and_answers(self, answer: bool) -> Measured:
        """Return the loss and, with `answer`, greedy answers that the rows' source verifies."""
        loss, perplexity, metrics = self._loss()
        speaks = self.objective.head not in TASKS  # a reward model answers nothing
        samples = self._answers() if answer and speaks and self.settings.generate else []
        return Measured(loss, perplexity, metrics, samples)

    @torch.no_grad()
    def _loss(self) -> tuple[float, float | None, dict[str, float]]:
        """Return the mean objective loss, the perplexity of a supervised token, and the other metrics."""
        trees, meter = self.held_out.trees, Monitor()
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

    def _answers(self) -> list[Sample]:
        rows = self.prompted()
        mine = self.processes.share(range(len(rows)))
        answered = self.answered([rows[i] for i in mine])
        samples = {i: self.sample(rows[i], answer.said) for i, answer in zip(mine, answered, strict=True)}
        everyones = {i: sample for part in self.processes.gather(samples) for i, sample in part.items()}
        return [everyones[i] for i in range(len(rows))]

    def prompted(self) -> list[Row]:
        """Return the held-out rows that have a prompt."""
        rows = (row for row in self.held_out.rows if row.fields.get("prompt") is not None)
        return list({id(row): row for row in rows}.values())  # several trees may be of one

    def answered(self, rows: Sequence[Row]) -> list[Answer]:
        """Answer the prompts of `rows` greedily."""
        prompts = [
            self.codec.prompt_ids(row.fields["prompt"], row.origin, row.fields.get("tools")) for row in rows
        ]
        return greedy(self.policy, self.codec, prompts, self.settings)

    def sample(self, row: Row, answer: str) -> Sample:
        """Return `answer` to the prompt of `row`, with what the rows' source says of it."""
        return Sample(
            origin=row.origin,
            prompt=plain_text(row.fields["prompt"]),
            answer=answer,
            expected=plain_text(row.fields.get("answer", row.fields.get("completion", ""))),
            score=self.source.verify(row, answer),
        )


def greedy(
    policy: ModelPolicy, codec: Codec, prompts: Sequence[Sequence[int]], settings: EvaluationConfig
) -> list[Answer]:
    """Answer `prompts` with the likeliest tokens, and return the answers in order."""
    made = dict(answers(policy, codec, prompts, Decoding(settings.max_new_tokens, settings.batch_size)))
    return [made[place][0] for place in range(len(prompts))]


def plain_text(value: object) -> str:
    """Return a prompt or completion as text: messages are joined, system messages left out."""
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence):  # an answer that is a number
        return str(value)
    return "\n".join(
        str(message.get("content") or "") for message in value if message.get("role") != "system"
    )
