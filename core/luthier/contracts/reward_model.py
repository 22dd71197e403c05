"""Reward models: how good a completion is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from luthier.contracts.data_source import DataSource, Row
from luthier.contracts.method import Method, option

if TYPE_CHECKING:
    from luthier.models import LoadedModel


@dataclass(frozen=True)
class Candidate:
    """A completion to be scored.

    Attributes:
        prompt: A text or messages.
        completion: The text that follows, without special tokens.
        tokens: Tokens it has, its end included.
        finished: It came to an end by itself.
        row: The row that the prompt comes from, with the answer that is expected, if one is.
    """

    prompt: Any
    completion: str
    tokens: int = 0
    finished: bool = True
    row: Row | None = None

    @property
    def origin(self) -> str:
        """Where the prompt comes from, for messages."""
        return self.row.origin if self.row else "a prompt"

    @property
    def tools(self) -> Any:
        """What may be called, as the row says."""
        return self.row.fields.get("tools") if self.row else None


Scorer = Callable[[Sequence[Candidate]], torch.Tensor]
"""Scores n candidates: (n,) float32 on the CPU, higher is better."""


@dataclass(frozen=True)
class Place:
    """Where a reward model is at work.

    Attributes:
        source: Who knows which answers are right.
        host: A model in memory that an adapter on the same base may share.
        device: Where a model of its own goes, in the words of ``model.device``.
        dtype: What it computes in, likewise.
        pack_tokens: Tokens one forward pass may hold.
    """

    source: DataSource | None = None
    host: LoadedModel | None = None
    device: str = "auto"
    dtype: str = "auto"
    pack_tokens: int = 4096


@dataclass(frozen=True, kw_only=True)
class RewardModel(Method):
    """Scores completions of prompts; several are added up, each by its weight."""

    weight: float = option(1.0, "Factor on its scores where several are added up.")

    @abstractmethod
    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> torch.Tensor:
        """Return ``(n,)`` float32 scores, one a (prompt, completion) pair; higher is better."""

    def scorer(self, place: Place) -> Scorer:
        """Return what scores in a run; overridden by what loads a model or looks at more than the texts.

        Raises:
            LuthierError: It cannot be at work there.
        """
        return lambda given: self.score([text_of(c.prompt) for c in given], [c.completion for c in given])


def text_of(prompt: Any) -> str:
    """Return a prompt as text: the contents of messages, one below the other."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(message.get("content") or "") for message in prompt)
