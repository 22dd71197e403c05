"""Direct preference optimisation: classify pairs by how far the policy moved from its reference."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from luthier import Register, hookimpl, option
from luthier_toolkits.preference import PairedObjective, Side, check_positive, check_share


@dataclass(frozen=True)
class DPO(PairedObjective):
    """``−(1 − ε) log σ(βh) − ε log σ(−βh)``, h = log π/π_ref of chosen − log π/π_ref of rejected.

    With ε = `label_smoothing` above 0 it is cDPO, for preferences of which a share is wrong.
    """

    source: ClassVar[str] = (
        "Rafailov et al. 2023, arXiv 2305.18290, equation 7; label_smoothing: Mitchell 2023, A note on DPO "
        "with noisy preferences"
    )
    needs_reference: ClassVar[bool] = True

    beta: float = option(0.1, "β: how much a step away from the reference costs.")
    label_smoothing: float = option(0.0, "ε: share of the preferences that may be wrong, in [0, 0.5).")

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A value that cannot train.
        """
        check_positive(beta=self.beta)
        check_share(label_smoothing=self.label_smoothing)

    def pair_loss(self, chosen: Side, rejected: Side) -> Tensor:
        """Return the loss of each pair, (n,)."""
        h = self.beta * (chosen.ratios - rejected.ratios)
        return -(1 - self.label_smoothing) * F.logsigmoid(h) - self.label_smoothing * F.logsigmoid(-h)


@hookimpl
def register_objectives(register: Register) -> None:
    """Register `dpo`."""
    register("dpo", DPO)
