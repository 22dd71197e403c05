"""Majority vote: the answer that most samples end with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import ClassVar, Literal

import torch

from luthier import Candidate, ConfigError, Register, Selector, hookimpl, option, spoken

NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Majority(Selector):
    """argmax over answers a of Σ_i w_i [a_i = a], w_i 1 or the score; of equal sums the first."""

    source: ClassVar[str] = (
        "Wang et al. 2022, arXiv 2203.11171, section 2; by scores: Li et al. 2022, arXiv 2206.02336, section "
        "3"
    )

    answer: Literal["text", "number", "pattern"] = option(
        "text", "What is counted: the whole text, its last number, or what `pattern` finds in it."
    )
    pattern: str | None = option(None, "A regular expression; its first group, if it has one, is counted.")
    weigh: Literal["count", "score"] = option("count", "Each vote counts one, or its score.")

    def __post_init__(self) -> None:
        """Check the pattern.

        Raises:
            ConfigError: It is missing, or no regular expression.
        """
        if (self.answer == "pattern") != (self.pattern is not None):
            raise ConfigError("selector: answer=pattern and pattern=… belong together")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ConfigError(f"selector.pattern is no regular expression: {error}") from error

    @property
    def needs_scores(self) -> bool:
        """Whether votes are weighed by scores; counting needs none."""
        return self.weigh == "score"

    def choose(self, candidates: Sequence[Candidate], scores: torch.Tensor) -> int:
        """Return the place of the best-scored candidate with the answer that has most votes.

        What came to no end, or has no answer, has no vote, unless none has.
        """
        answers = [self._answer(candidate) for candidate in candidates]
        weights = [1.0] * len(answers) if self.weigh == "count" else scores.tolist()
        votes: dict[str, float] = {}
        for answer, weight in zip(answers, weights, strict=True):
            if answer is not None:
                votes[answer] = votes.get(answer, 0.0) + weight
        if not votes:
            return int(scores.argmax())
        most = max(votes, key=votes.__getitem__)
        return max((i for i, answer in enumerate(answers) if answer == most), key=lambda i: float(scores[i]))

    def _answer(self, candidate: Candidate) -> str | None:
        if not candidate.finished:
            return None
        if self.answer == "text":
            return spoken(candidate.completion) or None
        matches = list(re.finditer(self.pattern or NUMBER, candidate.completion))
        if not matches:
            return None
        last = matches[-1]
        text = str(last[1] if last.re.groups else last[0]).replace(",", "")
        return text if self.answer == "pattern" else f"{Decimal(text).normalize():f}"


@hookimpl
def register_selectors(register: Register) -> None:
    """Register `majority`."""
    register("majority", Majority)
