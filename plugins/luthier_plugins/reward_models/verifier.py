"""A verifier: 1 for a right answer, 0 for a wrong one."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from luthier import (
    Candidate,
    ConfigError,
    DataError,
    DataSource,
    Place,
    Register,
    RewardModel,
    Scorer,
    hookimpl,
    option,
    spoken,
)

NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?")
_Check = Callable[[Candidate], float | None]


@dataclass(frozen=True)
class Verifier(RewardModel):
    """1 or 0 by the rows' source, the row's own answer, its number, or a pattern."""

    source: ClassVar[str] = "Cobbe et al. 2021, arXiv 2110.14168, section 2: the final answer decides"

    match: Literal["source", "exact", "number", "pattern"] = option(
        "source", "Right is: what the rows' source says, the answer itself, its last number, or `pattern`."
    )
    pattern: str | None = option(None, "A regular expression that a right completion contains.")
    unfinished: float | None = option(0.0, "Score of what came to no end; null: it is read as it is.")
    on_error: Literal["refuse", "zero"] = option(
        "refuse", "Where verifying fails: refuse, naming the row, or count zero."
    )

    def __post_init__(self) -> None:
        """Check the pattern.

        Raises:
            ConfigError: It is missing, or no regular expression.
        """
        if (self.match == "pattern") != (self.pattern is not None):
            raise ConfigError("reward_models.verifier: match=pattern and pattern=… belong together")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ConfigError(f"reward_models.verifier.pattern is no regular expression: {error}") from error

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> torch.Tensor:
        """Return (n,) float32.

        Raises:
            ConfigError: Texts alone have no source to ask.
            DataError: Nor an answer to compare with; only a pattern needs neither.
        """
        pairs = zip(prompts, completions, strict=True)
        return self.scorer(Place())([Candidate(prompt, completion) for prompt, completion in pairs])

    def scorer(self, place: Place) -> Scorer:
        """Return the check of `match` over candidates.

        Raises:
            ConfigError: There is no source to ask.
        """
        if self.match == "source" and place.source is None:
            raise ConfigError("reward_models.verifier.match=source needs rows; take exact, number or pattern")
        checks: dict[str, _Check] = {
            "source": functools.partial(_by_source, place.source),
            "exact": lambda candidate: float(
                spoken(candidate.completion) == spoken(str(_expected(candidate)))
            ),
            "number": lambda candidate: float(
                _same_number(spoken(candidate.completion), str(_expected(candidate)))
            ),
            "pattern": lambda candidate: float(
                re.search(self.pattern or "", candidate.completion) is not None
            ),
        }
        check = checks[self.match]

        def score(candidates: Sequence[Candidate]) -> torch.Tensor:
            return torch.tensor(
                [self._verified(candidate, check) for candidate in candidates], dtype=torch.float32
            )

        return score

    def _verified(self, candidate: Candidate, check: _Check) -> float:
        if self.unfinished is not None and not candidate.finished:
            return self.unfinished
        try:
            score = check(candidate)
        except DataError:
            raise
        except Exception as error:
            if self.on_error == "zero":
                return 0.0
            raise DataError(
                f"{candidate.origin}: verifying failed ({type(error).__name__}: {error}); "
                "reward_models.verifier.on_error=zero counts such answers as wrong"
            ) from error
        if score is None:
            raise DataError(f"{candidate.origin}: nothing says which answers are right; rows need 'answer'")
        return score


def _by_source(source: DataSource | None, candidate: Candidate) -> float | None:
    return source.verify(candidate.row, candidate.completion.strip()) if source and candidate.row else None


def _expected(candidate: Candidate) -> Any:
    fields = candidate.row.fields if candidate.row else {}
    answer = fields.get("answer", fields.get("completion"))
    if not isinstance(answer, str | int | float):
        raise DataError(f"{candidate.origin}: nothing says which answers are right; rows need 'answer'")
    return answer


def _same_number(answer: str, expected: str) -> bool:
    numbers = [NUMBER.findall(text) for text in (answer, expected)]
    if not all(numbers):
        return False
    number, other = (float(matches[-1].replace(",", "")) for matches in numbers)
    return math.isclose(number, other, rel_tol=1e-6, abs_tol=1e-9)


@hookimpl
def register_reward_models(register: Register) -> None:
    """Register `verifier`."""
    register("verifier", Verifier)
