"""Contrastive preference optimisation: DPO without its reference, tied to the likelihood of chosen."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from luthier import ConfigError, Register, hookimpl, option
from luthier_toolkits.preference import PairedObjective, Side, check_positive


@dataclass(frozen=True)
class CPO(PairedObjective):
    """``−log σ(β(log π of chosen − log π of rejected)) − w·mean log π(chosen)``, w = `nll_weight`.

    The first term is DPO's with a uniform reference. The second keeps the policy near the chosen completions;
    it is a mean over a completion's tokens, where the paper has their sum.
    """

    source: ClassVar[str] = "Xu et al. 2024, arXiv 2401.08417, section 3"

    beta: float = option(0.1, "β: scale of the difference of log-probabilities.")
    nll_weight: float = option(1.0, "w: weight of the chosen completion's likelihood; 0: none.")

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A value that cannot train.
        """
        check_positive(beta=self.beta)
        if not 0 <= self.nll_weight < math.inf:
            raise ConfigError(f"objective.nll_weight={self.nll_weight} must be finite and not negative")

    def pair_loss(self, chosen: Side, rejected: Side) -> Tensor:
        """Return the loss of each pair, (n,)."""
        preference = -F.logsigmoid(self.beta * (chosen.sums - rejected.sums))
        return preference - self.nll_weight * chosen.means


@hookimpl
def register_objectives(register: Register) -> None:
    """Register `cpo`."""
    register("cpo", CPO)
