"""What is counted over answered prompts: right ones, scores, and what a choice among N would give."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from luthier.contracts import Selector
from luthier_plugins.commands.sample.candidates import Answered
from luthier_toolkits.plots import figure


@dataclass(frozen=True)
class Point:
    """What choosing among `drawn` answers gives.

    Attributes:
        drawn: N.
        score: Mean score of what is chosen; None: nothing scores answers.
        right: Share of prompts where it is right; None: nothing verifies answers.
        divergence: Bound in nats on how far it is from the policy; None: not known.
    """

    drawn: int
    score: float | None
    right: float | None
    divergence: float | None


@dataclass
class SampleStatistics:
    """Counts and sums, which JSON holds; `curve` has sums by N: score, its weight, right, its weight."""

    prompts: int = 0
    answers: int = 0
    judged: int = 0
    right: int = 0
    solved: int = 0
    finished: int = 0
    tokens: int = 0
    written: int = 0
    scored: int = 0
    flat: int = 0
    curve: dict[str, list[float]] = field(default_factory=dict)

    def add(self, answered: Answered, written: int, selector: Selector) -> None:
        """Count an answered prompt, of which `written` lines were written."""
        rights = [right for right in answered.rights if right is not None]
        self.prompts += 1
        self.answers += len(answered)
        self.judged += len(rights)
        self.right += sum(rights)
        self.solved += any(rights)
        self.finished += sum(candidate.finished for candidate in answered.candidates)
        self.tokens += sum(candidate.tokens for candidate in answered.candidates)
        self.written += written
        if answered.scores is not None:
            self.scored += 1
            self.flat += len(answered) > 1 and bool((answered.scores == answered.scores[0]).all())
        if answered.chosen is not None:
            for drawn in powers(len(answered)):
                self._draw(answered, drawn, selector)

    def _draw(self, answered: Answered, drawn: int, selector: Selector) -> None:
        sums = self.curve.setdefault(str(drawn), [0.0] * 4)
        scores = torch.zeros(len(answered)) if answered.scores is None else answered.scores
        if answered.scores is not None:
            sums[0] += selector.expected(answered.candidates, scores, scores, drawn)
            sums[1] += 1
        if None not in answered.rights:
            rights = torch.tensor([float(bool(right)) for right in answered.rights])
            sums[2] += selector.expected(answered.candidates, scores, rights, drawn)
            sums[3] += 1

    def points(self, selector: Selector) -> list[Point]:
        """Return the curve over N."""
        return [
            Point(
                int(drawn),
                score / scored if scored else None,
                right / judged if judged else None,
                selector.divergence(int(drawn)),
            )
            for drawn, (score, scored, right, judged) in sorted(
                self.curve.items(), key=lambda item: int(item[0])
            )
        ]

    def state(self) -> dict[str, Any]:
        """Return it as JSON; ``SampleStatistics(**state)`` is the same again."""
        return dataclasses.asdict(self)


def powers(count: int) -> list[int]:
    """Return 1, 2, 4 … up to `count`, and `count` itself."""
    return sorted({2**exponent for exponent in range(count.bit_length())} - {0} | {count})


def draw_curve(points: list[Point], file: Path) -> None:
    """Draw score, share of right answers and the bound on the divergence against N."""
    with figure(file, "N, answers to choose among", "mean score of the chosen answer") as axes:
        drawn = [point.drawn for point in points]
        axes.set_xscale("log", base=2)
        axes.set_xticks(drawn, [str(count) for count in drawn])
        lines = []
        for name, values, colour in (
            ("score", [point.score for point in points], "C0"),
            ("share right", [point.right for point in points], "C2"),
        ):
            if None not in values:
                lines += axes.plot(drawn, values, marker="o", color=colour, label=name)
        bounds = [point.divergence for point in points]
        if None not in bounds:
            other = axes.twinx()
            other.spines[["top"]].set_visible(False)
            other.set_ylabel("bound on the KL divergence, nats")
            lines += other.plot(drawn, bounds, color="0.6", linestyle="--", label="log N − (N−1)/N")
        axes.legend(handles=lines, frameon=False, loc="upper left")
