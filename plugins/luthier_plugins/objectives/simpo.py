"""Simple preference optimisation: the mean log-probability is the reward, and no reference is needed."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from luthier import ConfigError, Register, hookimpl, option
from luthier_toolkits.preference import PairedObjective, Side, check_positive


@dataclass(frozen=True)
class SimPO(PairedObjective):
    """``−log σ(β·(mean log π of chosen − mean log π of rejected) − γ)``, means over a completion's tokens."""

    source: ClassVar[str] = "Meng et al. 2024, arXiv 2405.14734, equation 6"

    beta: float = option(2.0, "β: scale of the rewards.")
    gamma: float = option(1.0, "γ: the margin that chosen should have, in units of the scaled rewards.")

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A value that cannot train.
        """
        check_positive(beta=self.beta)
        if not math.isfinite(self.gamma):
            raise ConfigError(f"objective.gamma={self.gamma} must be finite")

    def pair_loss(self, chosen: Side, rejected: Side) -> Tensor:
        """Return the loss of each pair, (n,)."""
        return -F.logsigmoid(self.reward(chosen) - self.reward(rejected) - self.gamma)

    def reward(self, side: Side) -> Tensor:
        """Return β·mean log π, (n,)."""
        return self.beta * side.means


@hookimpl
def register_objectives(register: Register) -> None:
    """Register `simpo`."""
    register("simpo", SimPO)
