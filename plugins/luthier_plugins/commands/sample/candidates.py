"""A prompt with its answers, their scores and the one that was chosen, and what is written of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from luthier.contracts import Candidate, Row
from luthier.evaluation import plain_text

WRITES = ("candidates", "pairs", "rows")


@dataclass(frozen=True)
class Answered:
    """A prompt and n answers to it.

    Attributes:
        row: Where the prompt comes from.
        candidates: The answers.
        rights: Whether the row's source calls each of them right; None where it cannot tell.
        scores: (n,) float32 that they are chosen by; None: nothing scores them.
        parts: What each reward model adds, before its weight, by name: (n,) each.
        chosen: Place of the one that the selector takes; None: there is nothing to choose by.
    """

    row: Row
    candidates: Sequence[Candidate]
    rights: Sequence[bool | None]
    scores: torch.Tensor | None
    parts: Mapping[str, torch.Tensor]
    chosen: int | None

    def __len__(self) -> int:
        return len(self.candidates)


@dataclass(frozen=True)
class Writer:
    """Makes lines of answered prompts.

    Attributes:
        what: candidates, pairs or rows.
        least: Least score of a row's answer and of a pair's chosen side, which the rejected one stays below;
            None: any.
        pairs_each: Most pairs of one prompt.
        gold: Take a row's own completion where no answer is good enough.
    """

    what: str
    least: float | None
    pairs_each: int
    gold: bool

    def lines(self, answered: Answered) -> Iterator[dict[str, Any]]:
        """Yield what is written of a prompt; equal texts count once in pairs and rows."""
        if self.what == "candidates":
            yield from _candidates(answered)
            return
        prompt, own = answered.row.fields["prompt"], answered.row.fields.get("completion")
        expected = {} if own is None else {"answer": plain_text(own).strip()}
        good = self._good(answered)
        if not good and self.gold and own is not None:
            good = [plain_text(own) if isinstance(prompt, str) else plain_text(own).strip()]
        if self.what == "rows":
            for text in good[:1]:
                yield {"prompt": prompt, "completion": _spoken(prompt, text), **expected}
            return
        for chosen, rejected in list(zip(good, self._bad(answered, good), strict=False))[: self.pairs_each]:
            yield {"prompt": prompt, "chosen": _spoken(prompt, chosen), "rejected": _spoken(prompt, rejected),
                   **expected}  # fmt: skip

    def _good(self, answered: Answered) -> list[str]:
        """Return the texts that are good enough, the chosen one first and then by score."""
        scores = _scores(answered)
        order = sorted(range(len(answered)), key=lambda place: (place != answered.chosen, -scores[place]))
        if self.what == "pairs" and self.least is None:  # a pair's sides must differ in score
            order = [place for place in order if scores[place] > min(scores)]
        kept = [
            p
            for p in order
            if self.least is None or (answered.candidates[p].finished and self._passes(scores[p]))
        ]
        return [
            text for text in dict.fromkeys(answered.candidates[p].completion for p in kept) if text.strip()
        ]

    def _bad(self, answered: Answered, good: Sequence[str]) -> list[str]:
        """Return the texts that are not, the worst first; without `least`, those below the best score.

        What came to no end is left out: trained on, it would have an end that the model never gave it.
        """
        scores, taken = _scores(answered), good[: self.pairs_each]
        best = max(scores) if self.least is None else self.least
        order = sorted(range(len(answered)), key=lambda place: scores[place])
        below = [place for place in order if scores[place] < best and answered.candidates[place].finished]
        texts = dict.fromkeys(answered.candidates[place].completion for place in below)
        return [text for text in texts if text.strip() and text not in taken]

    def _passes(self, score: float) -> bool:
        return self.least is None or score >= self.least


def _scores(answered: Answered) -> list[float]:
    return [0.0] * len(answered) if answered.scores is None else [float(score) for score in answered.scores]


def _candidates(answered: Answered) -> Iterator[dict[str, Any]]:
    prompt = answered.row.fields["prompt"]
    for place, (candidate, right) in enumerate(zip(answered.candidates, answered.rights, strict=True)):
        parts = {name: round(float(scores[place]), 6) for name, scores in answered.parts.items()}
        yield {
            "prompt": prompt,
            "completion": _spoken(prompt, candidate.completion),
            "score": None if answered.scores is None else round(float(answered.scores[place]), 6),
            **({"scores": parts} if parts else {}),
            **({} if right is None else {"right": right}),
            **({} if answered.chosen is None else {"chosen": place == answered.chosen}),
            "finished": candidate.finished,
            "tokens": candidate.tokens,
            "origin": answered.row.origin,
        }


def _spoken(prompt: Any, text: str) -> Any:
    """Return an answer in the form of its prompt: messages after messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
