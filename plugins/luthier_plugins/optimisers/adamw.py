"""AdamW, torch's fused implementation."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from luthier import Register, hookimpl
from luthier_toolkits.adam import AdamOptimiser


@dataclass(frozen=True)
class AdamW(AdamOptimiser):
    """Adam with decoupled weight decay; vectors (norms, biases) are not decayed."""

    source: ClassVar[str] = (
        "Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2; lr_factors: LoRA+, Hayou et al. 2024, "
        "arXiv 2402.12354"
    )

    def build(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Return `torch.optim.AdamW`, fused.

        Raises:
            ConfigError: A pattern matches nothing.
        """
        betas = (self.beta1, self.beta2)
        return torch.optim.AdamW(
            self.torch_groups(parameters), lr=self.lr, betas=betas, eps=self.eps, fused=True
        )

    def state_bytes(self, name: str, shape: tuple[int, ...]) -> float:
        """Two fp32 moments."""
        return 8.0 * math.prod(shape)


@hookimpl
def register_optimisers(register: Register) -> None:
    """Register `adamw`."""
    register("adamw", AdamW)
