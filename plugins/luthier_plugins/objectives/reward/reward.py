"""An outcome reward model: a score a completion, learned from pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from luthier import Codec, ConfigError, DataError, Loss, Pack, Policy, Register, Row, Tree, hookimpl, option
from luthier_plugins.objectives.reward.calibration import (
    calibration_metrics,
    correlation_metrics,
    draw_calibration,
    summarised,
)
from luthier_toolkits.preference import PairRows, preference_metrics


@dataclass(frozen=True)
class Reward(PairRows):
    """``−log σ(r_w − r_l − m) + c·(r_w + r_l)²``, r linear in the last hidden state of a completion.

    m is a row's ``margin``, 0 without one; the second term keeps scores around zero, of which the first one
    only sees differences. Saved as transformers' model for sequence classification with one label.
    """

    source: ClassVar[str] = (
        "Bradley and Terry 1952; Ouyang et al. 2022, arXiv 2203.02155, equation 1; margin: Touvron et al. "
        "2023, arXiv 2307.09288, equation 2; centring: Eisenstein et al. 2023, arXiv 2312.09244, section 2"
    )
    head: ClassVar[str | None] = "sequence"
    holds: ClassVar[Mapping[str, str]] = {"score": "head"}

    centre: float = option(0.01, "c: how strongly the two scores of a pair are kept opposite.")

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            ConfigError: It is negative.
        """
        if not 0 <= self.centre < math.inf:
            raise ConfigError(f"objective.centre={self.centre} must not be negative")

    def encode(self, row: Row, codec: Codec) -> Tree:
        """Return the prompt with both completions, and the margin among its values.

        Raises:
            DataError: The margin is no number.
        """
        tree, margin = super().encode(row, codec), row.fields.get("margin")
        if margin is None:
            return tree
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
            raise DataError(f"{row.origin}: margin must be a number, got {margin!r}")
        return replace(tree, values={"margin": float(margin)})

    def loss(self, policy: Policy, pack: Pack) -> Loss:
        """Return the sum of the pairs' losses; its weight is their number."""
        scores = policy.scores(pack, pack.ends)
        chosen, rejected = scores[0::2], scores[1::2]
        margins = scores.new_tensor([tree.values.get("margin", 0.0) for tree in pack.trees])
        losses = -F.logsigmoid(chosen - rejected - margins) + self.centre * (chosen + rejected).square()
        return Loss(losses.sum(), len(losses), self._metrics(pack, chosen.detach(), rejected.detach()))

    def _metrics(self, pack: Pack, chosen: Tensor, rejected: Tensor) -> dict[str, tuple[Tensor, float]]:
        sides = [[len(tree.branches[side].ids) for tree in pack.trees] for side in (0, 1)]
        lengths = chosen.new_tensor(sides)
        values = preference_metrics((chosen, rejected), (lengths[0], lengths[1])) | {
            "scores/chosen": chosen,
            "scores/rejected": rejected,
        }
        return {
            **{name: (value.sum(), float(len(value))) for name, value in values.items()},
            **calibration_metrics(chosen - rejected),
            **correlation_metrics("length_correlation", torch.cat([chosen, rejected]), lengths.flatten()),
        }

    def summarise(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """Return the metrics with calibration and the correlation of scores with lengths."""
        return summarised(means)

    def draw(self, metrics: Mapping[str, float], folder: Path) -> None:
        """Draw ``calibration.png``."""
        draw_calibration(metrics, folder / "calibration.png")


@hookimpl
def register_objectives(register: Register) -> None:
    """Register `reward`."""
    register("reward", Reward)
