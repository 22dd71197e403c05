"""A penalty on length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from luthier import Candidate, ConfigError, Place, Register, RewardModel, Scorer, hookimpl, option


@dataclass(frozen=True)
class Length(RewardModel):
    """``−per_token · max(0, |y| − free)``, |y| in tokens."""

    source: ClassVar[str] = "Singhal et al. 2023, arXiv 2310.03716, section 4: length as a term of the reward"

    per_token: float = option(0.01, "What a token costs.")
    free: int = option(0, "Tokens that cost nothing.")

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            ConfigError: `free` is negative.
        """
        if self.free < 0:
            raise ConfigError(f"reward_models.length.free={self.free} must not be negative")

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> torch.Tensor:
        """Return (n,) float32, of words, as texts alone have no tokens."""
        return self._penalty([len(completion.split()) for completion in completions])

    def scorer(self, place: Place) -> Scorer:
        """Return the penalty on the candidates' tokens."""

        def score(candidates: Sequence[Candidate]) -> torch.Tensor:
            return self._penalty([candidate.tokens for candidate in candidates])

        return score

    def _penalty(self, lengths: Sequence[int]) -> torch.Tensor:
        beyond = torch.tensor(lengths, dtype=torch.float32).sub_(self.free).clamp_(min=0)
        return -self.per_token * beyond


@hookimpl
def register_reward_models(register: Register) -> None:
    """Register `length`."""
    register("length", Length)
