"""A penalty on completions that came to no end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from luthier import Candidate, Place, Register, RewardModel, Scorer, hookimpl, option


@dataclass(frozen=True)
class MissingEnd(RewardModel):
    """−penalty where a completion was cut off instead of ending by itself."""

    source: ClassVar[str] = "Huang et al. 2024, arXiv 2403.17031, section 3: the end-of-text trick"

    penalty: float = option(1.0, "What a missing end costs.")

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> torch.Tensor:
        """Return zeros, (n,) float32: texts alone do not say whether they were cut off."""
        return torch.zeros(len(prompts))

    def scorer(self, place: Place) -> Scorer:
        """Return the penalty on candidates."""

        def score(candidates: Sequence[Candidate]) -> torch.Tensor:
            return torch.tensor([0.0 if candidate.finished else -self.penalty for candidate in candidates])

        return score


@hookimpl
def register_reward_models(register: Register) -> None:
    """Register `missing_end`."""
    register("missing_end", MissingEnd)
