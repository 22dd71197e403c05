"""The suite of reward models."""

from __future__ import annotations

from typing import ClassVar

import torch

from luthier.contracts import RewardModel
from luthier.testing.suite import Suite, apart

PROMPTS = ("What is 12 + 7?", "one two", "The capital of France is", "What is 12 + 7?")
COMPLETIONS = (" The answer is 19.", " three four five", " Paris", "")


class RewardModelSuite(Suite):
    """What a `luthier.RewardModel` promises.

    Attributes:
        prompts: What it is asked about; at least two.
        completions: An answer to each.
        tolerance: How far a score may stray with its batch: 0 for rules, fp32 rounding for models.
    """

    method: ClassVar[type[RewardModel]]
    prompts: ClassVar[tuple[str, ...]] = PROMPTS
    completions: ClassVar[tuple[str, ...]] = COMPLETIONS
    tolerance: ClassVar[float] = 1e-5

    def scores(self, places: list[int]) -> torch.Tensor:
        """Return the scores of the pairs at `places`."""
        prompts = [self.prompts[place] for place in places]
        scores: torch.Tensor = self.make().score(prompts, [self.completions[place] for place in places])
        return scores

    def test_it_scores_every_pair(self) -> None:
        """`score` returns (n,) float32, finite, without a gradient; (0,) for no pairs."""
        for count in (len(self.prompts), 1, 0):
            scores = self.scores(list(range(count)))
            assert scores.shape == (count,), f"{count} pairs give shape {tuple(scores.shape)}, not ({count},)"
            assert scores.dtype == torch.float32, f"scores are {scores.dtype}, not float32"
            assert torch.isfinite(scores).all(), f"scores are not finite: {scores.tolist()}"
            assert not scores.requires_grad, "scores carry a gradient; score under torch.no_grad()"

    def test_the_order_of_the_pairs_is_theirs_alone(self) -> None:
        """Pairs in another order have the same scores in that order."""
        order = list(range(len(self.prompts)))[::-1]
        off = apart(self.scores(order), self.scores(order[::-1])[order])
        assert off <= self.tolerance, f"in another order the scores are {off:.1e} apart"

    def test_a_score_does_not_depend_on_its_batch(self) -> None:
        """A pair alone has the score it has among others: no normalising over the batch, no padding leak."""
        everything = list(range(len(self.prompts)))
        off = apart(torch.cat([self.scores([place]) for place in everything]), self.scores(everything))
        assert off <= self.tolerance, f"alone, the scores are {off:.1e} apart from those in a batch"

    def test_equal_questions_have_equal_answers(self) -> None:
        """Asked twice, it says the same."""
        everything = list(range(len(self.prompts)))
        assert torch.equal(self.scores(everything), self.scores(everything)), "two calls give two scores"
