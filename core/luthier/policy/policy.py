"""What objectives ask of a policy: log-probabilities, hidden states and scores of packs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from luthier.trees import Pack


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of a pack's scored tokens.

    Attributes:
        values: (N,) float32.
        offsets: C + 1 host integers; child c owns ``values[offsets[c]:offsets[c + 1]]``.
    """

    values: torch.Tensor
    offsets: tuple[int, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Scored tokens of each of the C children."""
        return tuple(stop - start for start, stop in zip(self.offsets, self.offsets[1:], strict=False))

    def sums(self) -> torch.Tensor:
        """Return (C,), the log-probability of each child; 0 where nothing is scored."""
        if len(self.offsets) == 1:
            return self.values
        return torch.stack([part.sum() for part in torch.split(self.values, list(self.lengths))])

    def children(self, of: Sequence[int]) -> Logprobs:
        """Return those of the children numbered `of` alone, in that order."""
        parts = torch.split(self.values, list(self.lengths))
        offsets = itertools.accumulate((self.lengths[child] for child in of), initial=0)
        return Logprobs(torch.cat([parts[child] for child in of]), tuple(offsets))

    def means(self) -> torch.Tensor:
        """Return (C,), each child's mean over its scored tokens; 0 where nothing is scored."""
        lengths = torch.tensor([max(1, length) for length in self.lengths], device=self.values.device)
        return self.sums() / lengths


class Policy(Protocol):
    """A causal language model as objectives see it; `luthier.ModelPolicy` is the one that runs a model."""

    def logprobs(self, pack: Pack) -> Logprobs:
        """Return the log-probabilities of the pack's scored tokens, differentiable."""

    def hidden(self, pack: Pack, positions: torch.Tensor) -> torch.Tensor:
        """Return (n, d), the last hidden states at `positions` (n,) of the pack's row; differentiable."""

    def scores(self, pack: Pack, positions: torch.Tensor) -> torch.Tensor:
        """Return (n,) float32, what the model's score head makes of the hidden states at `positions` (n,).

        Raises:
            LuthierError: The model has no head.
        """

    def valued(self, pack: Pack) -> tuple[Logprobs, torch.Tensor]:
        """Return the log-probabilities of the scored tokens, and (N,) float32, a value before each of them.

        A value is what the head makes of the hidden state that predicts the token. One forward pass.

        Raises:
            LuthierError: The model has no head.
        """

    def reference(self, pack: Pack) -> torch.Tensor:
        """Return (C,) float32, the log-probability of each child under the reference; a constant.

        Raises:
            LuthierError: The reference was not asked about these trees before training.
        """
