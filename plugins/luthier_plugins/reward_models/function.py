"""Any Python callable of an installed package, by entry point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar

import torch

from luthier import (
    Candidate,
    ConfigError,
    DataError,
    Place,
    PluginError,
    Register,
    RewardModel,
    Scorer,
    hookimpl,
    option,
    text_of,
    unknown,
)

GROUP = "luthier.rewards"


@dataclass(frozen=True)
class Function(RewardModel):
    """``f(prompts, completions, rows) -> scores``, an entry point of the group ``luthier.rewards``.

    prompts and completions are texts, rows the rows' columns (None without rows); one number each.
    """

    source: ClassVar[str] = "the package that registers it"

    function: str | None = option(None, "Name of the entry point.")

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> torch.Tensor:
        """Return (n,) float32."""
        return self._called(self._find(), prompts, completions, [None] * len(prompts))

    def scorer(self, place: Place) -> Scorer:
        """Load the callable.

        Raises:
            ConfigError: None is named, or no package has it.
            PluginError: It cannot be imported.
        """
        call = self._find()

        def score(candidates: Sequence[Candidate]) -> torch.Tensor:
            prompts, completions = (
                [text_of(candidate.prompt) for candidate in candidates],
                [c.completion for c in candidates],
            )
            return self._called(
                call,
                prompts,
                completions,
                [candidate.row and dict(candidate.row.fields) for candidate in candidates],
            )

        return score

    def _find(self) -> Callable[..., Any]:
        known = {entry.name: entry for entry in entry_points(group=GROUP)}
        if not self.function or self.function not in known:
            raise ConfigError(unknown("reward_models.function.function", str(self.function), known))
        try:
            function: Callable[..., Any] = known[self.function].load()
        except Exception as error:
            raise PluginError(f"{known[self.function].value} cannot be imported: {error}") from error
        return function

    def _called(self, call: Callable[..., Any], *texts: Sequence[Any]) -> torch.Tensor:
        if not texts[0]:
            return torch.zeros(0)
        try:
            scores = torch.as_tensor([float(score) for score in call(*texts)], dtype=torch.float32)
        except Exception as error:
            raise DataError(f"{self.function} failed: {type(error).__name__}: {error}") from error
        if len(scores) != len(texts[0]):
            raise DataError(f"{self.function} gave {len(scores)} scores for {len(texts[0])} completions")
        return scores


@hookimpl
def register_reward_models(register: Register) -> None:
    """Register `function`."""
    register("function", Function)
