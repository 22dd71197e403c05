"""The suite of selectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from luthier.contracts import Candidate, Selector
from luthier.testing.suite import Suite, seeded

TEXTS = ("It is 19.", "19", "It is 20.", "19", "no idea", "It is 19.")
SCORES = (0.3, 0.9, 0.1, 0.8, -0.5, 0.3)


class SelectorSuite(Suite):
    """What a `luthier.Selector` promises.

    Attributes:
        texts: Answers to one prompt, at least two.
        scores: Of each.
    """

    method: ClassVar[type[Selector]]
    texts: ClassVar[Sequence[str]] = TEXTS
    scores: ClassVar[Sequence[float]] = SCORES

    def given(self, count: int | None = None) -> tuple[list[Candidate], torch.Tensor]:
        """Return the first `count` candidates with their scores."""
        candidates = [Candidate("7 + 12?", text, len(text.split()) + 1) for text in self.texts[:count]]
        return candidates, torch.tensor(self.scores[:count])

    def test_it_chooses_one_of_them(self) -> None:
        """`choose` returns a place among the candidates, an int, whatever their number."""
        for count in range(1, len(self.texts) + 1):
            candidates, scores = self.given(count)
            place = self.make().choose(candidates, scores)
            assert type(place) is int, f"choose returned a {type(place).__name__}, not an int"
            assert 0 <= place < count, f"of {count} candidates it took number {place}"

    def test_it_chooses_alike_every_time(self) -> None:
        """The same candidates and scores have the same choice, and neither is written to."""
        candidates, scores = self.given()
        made = self.make()
        first = made.choose(candidates, scores)
        assert first == made.choose(*self.given()) == self.make().choose(*self.given()), (
            "it chose twice and took two; draw nothing, keep no state"
        )
        assert candidates == self.given()[0], "choose wrote into the candidates"
        assert torch.equal(scores, self.given()[1]), "choose wrote into the scores"

    def test_what_is_expected_of_one_is_the_mean(self) -> None:
        """Of one candidate there is no choice: `expected` of one drawn is the mean of the values."""
        candidates, scores = self.given()
        values = torch.rand(len(candidates), generator=seeded())
        mean = self.make().expected(candidates, scores, values, 1)
        assert abs(mean - float(values.mean())) < 1e-6, f"of one drawn: {mean}, mean {float(values.mean())}"

    def test_what_is_expected_of_all_is_the_choice(self) -> None:
        """Of all of them there is one draw: `expected` is the value of what is chosen."""
        candidates, scores = self.given()
        values = torch.rand(len(candidates), generator=seeded())
        made = self.make()
        value = made.expected(candidates, scores, values, len(candidates))
        chosen = float(values[made.choose(candidates, scores)])
        assert abs(value - chosen) < 1e-6, f"of all drawn: {value}, the chosen one's {chosen}"
