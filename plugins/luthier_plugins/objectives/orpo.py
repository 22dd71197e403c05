"""Odds-ratio preference optimisation: supervised tuning with a preference, in one stage, no reference."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from luthier import Register, hookimpl, option
from luthier_toolkits.preference import PairedObjective, Side, check_positive, log1mexp


@dataclass(frozen=True)
class ORPO(PairedObjective):
    """``−mean log π(chosen) − β log σ(log odds of chosen − log odds of rejected)``.

    The odds are p/(1 − p) of p = exp(mean log π), the geometric mean of a completion's token probabilities.
    """

    source: ClassVar[str] = "Hong et al. 2024, arXiv 2403.07691, equations 6 and 7; there β is λ"

    beta: float = option(0.1, "λ of the paper: weight of the preference beside the likelihood of chosen.")

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A value that cannot train.
        """
        check_positive(beta=self.beta)

    def pair_loss(self, chosen: Side, rejected: Side) -> Tensor:
        """Return the loss of each pair, (n,)."""
        ratio = chosen.means - rejected.means - (log1mexp(chosen.means) - log1mexp(rejected.means))
        return -chosen.means - self.beta * F.logsigmoid(ratio)

    def reward(self, side: Side) -> Tensor:
        """Return λ·mean log π, (n,)."""
        return self.beta * side.means


@hookimpl
def register_objectives(register: Register) -> None:
    """Register `orpo`."""
    register("orpo", ORPO)
