"""An outcome reward model: what a model trained with ``objective=reward`` says of a whole completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from luthier import Candidate, Place, Register, RewardModel, Scorer, hookimpl, option
from luthier_toolkits.rewards import reward_network


@dataclass(frozen=True)
class Outcome(RewardModel):
    """r(x, y), linear in the last hidden state of the completion; the text is read with its own tokenizer.

    An adapter on the base that is in memory already shares it.
    """

    source: ClassVar[str] = "Ouyang et al. 2022, arXiv 2203.02155, section 3.5"

    model: str | None = option(None, "Run or model folder of objective=reward, or of a sequence classifier.")

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> torch.Tensor:
        """Return (n,) float32; the model is loaded for it."""
        pairs = zip(prompts, completions, strict=True)
        return self.scorer(Place())([Candidate(prompt, completion) for prompt, completion in pairs])

    def scorer(self, place: Place) -> Scorer:
        """Load the model.

        Raises:
            ModelError: It is not there, or has no head for sequences.
        """
        return reward_network(self.model, "sequence", place, "outcome").ends


@hookimpl
def register_reward_models(register: Register) -> None:
    """Register `outcome`."""
    register("outcome", Outcome)
