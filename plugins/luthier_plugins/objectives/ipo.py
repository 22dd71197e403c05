"""Identity preference optimisation: a margin to reach, not to grow without end."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from luthier import Register, hookimpl, option
from luthier_toolkits.preference import PairedObjective, Side, check_positive


@dataclass(frozen=True)
class IPO(PairedObjective):
    """``(h − 1/(2β))²``, h = log π/π_ref of chosen − log π/π_ref of rejected, per token of each.

    The per-token form is the one behind the paper's results; with summed log-ratios a margin would be
    reached by long completions alone.
    """

    source: ClassVar[str] = "Azar et al. 2023, arXiv 2310.12036, equation 17; there β is τ"
    needs_reference: ClassVar[bool] = True

    beta: float = option(0.1, "β: half the inverse of the margin to reach.")
    length_normalised: bool = option(True, "Take log-ratios per token; false: summed over the completion.")

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A value that cannot train.
        """
        check_positive(beta=self.beta)

    def pair_loss(self, chosen: Side, rejected: Side) -> Tensor:
        """Return the loss of each pair, (n,)."""
        h = self._ratios(chosen) - self._ratios(rejected)
        return (h - 1 / (2 * self.beta)).square()

    def reward(self, side: Side) -> Tensor:
        """Return β times the log-ratio that the loss compares, (n,)."""
        return self.beta * self._ratios(side)

    def _ratios(self, side: Side) -> Tensor:
        return side.ratios / side.lengths if self.length_normalised else side.ratios


@hookimpl
def register_objectives(register: Register) -> None:
    """Register `ipo`."""
    register("ipo", IPO)
