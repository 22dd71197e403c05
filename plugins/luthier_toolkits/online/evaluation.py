"""Held-out quality of what learns from its own answers: the reward of greedy ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from luthier import Candidate, Sample
from luthier.contracts import Measured
from luthier.evaluation import Evaluator
from luthier_toolkits.rewards import Scoring


@dataclass(frozen=True)
class _Part:
    """What one process measured: a sample by the place of its row, and of every answer what is averaged."""

    samples: Mapping[int, Sample]
    rewards: list[float]
    finished: list[bool]
    lengths: list[int]


def rewarded(evaluator: Evaluator, scoring: Scoring) -> Measured:
    """Answer greedily and have the reward models score it; less reward is more loss."""
    rows = evaluator.prompted()
    mine = evaluator.processes.share(range(len(rows)))
    answers = evaluator.answered([rows[i] for i in mine])
    candidates = []
    for i, answer in zip(mine, answers, strict=True):
        prompt = rows[i].fields["prompt"]
        candidates.append(Candidate(prompt, answer.after(prompt), len(answer.ids), answer.finished, rows[i]))
    part = _Part(
        {i: evaluator.sample(rows[i], answer.said) for i, answer in zip(mine, answers, strict=True)},
        scoring(candidates).total.tolist(),
        [answer.finished for answer in answers],
        [candidate.tokens for candidate in candidates],
    )
    parts = evaluator.processes.gather(part)
    samples = {i: sample for part in parts for i, sample in part.samples.items()}
    metrics = {
        "reward": sum(x for part in parts for x in part.rewards) / len(rows),
        "finished": sum(x for part in parts for x in part.finished) / len(rows),
        "length": sum(x for part in parts for x in part.lengths) / len(rows),
    }
    return Measured(-metrics["reward"], None, metrics, [samples[i] for i in range(len(rows))])
