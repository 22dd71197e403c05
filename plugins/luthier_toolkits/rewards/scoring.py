"""The reward models of a run at work: every one's scores, and their weighted sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from omegaconf import DictConfig

from luthier import config as configs
from luthier.contracts import Candidate, Place, RewardModel, Scorer
from luthier.errors import DataError


@dataclass(frozen=True)
class Scores:
    """What reward models say of n candidates.

    Attributes:
        total: (n,) float32, the weighted sum.
        parts: Name → (n,) float32, before its weight.
    """

    total: torch.Tensor
    parts: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Scoring:
    """Scorers by name, with their weights; at least one."""

    scorers: Mapping[str, tuple[float, Scorer]]

    @classmethod
    def of(cls, nodes: Mapping[str, DictConfig], place: Place) -> Scoring | None:
        """Return the reward models that `nodes` configure, at work in `place`; None without one.

        Raises:
            LuthierError: One cannot be at work there.
        """
        models: dict[str, RewardModel] = {
            name: configs.build("reward_model", node) for name, node in nodes.items()
        }
        made = {name: (model.weight, model.scorer(place)) for name, model in models.items()}
        return cls(made) if made else None

    def __call__(self, candidates: Sequence[Candidate]) -> Scores:
        """Score `candidates`.

        Raises:
            DataError: A score is not finite; the row is named.
        """
        parts = {name: scorer(candidates) for name, (_, scorer) in self.scorers.items()}
        for name, scores in parts.items():
            bad = (~torch.isfinite(scores)).nonzero()
            if len(bad):
                place = int(bad[0])
                raise DataError(
                    f"{candidates[place].origin}: reward_models.{name} gives {float(scores[place])}, "
                    "expected a finite score"
                )
        weighted = [self.scorers[name][0] * scores for name, scores in parts.items()]
        return Scores(torch.stack(weighted).sum(0), parts)
