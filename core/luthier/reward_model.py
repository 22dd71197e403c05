"""Reward models: how good a completion is."""

from abc import abstractmethod
from collections.abc import Sequence

import torch

from luthier.method import Method


class RewardModel(Method):
    """Scores completions of prompts."""

    @abstractmethod
    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> torch.Tensor:
        """Return ``(n,)`` float32 scores, one a (prompt, completion) pair; higher is better."""
