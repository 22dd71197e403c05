"""AdamW, torch's fused implementation."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from luthier import ConfigError, Optimiser, Register, hookimpl, option


@dataclass(frozen=True)
class AdamW(Optimiser):
    """Adam with decoupled weight decay; vectors (norms, biases) are not decayed."""

    source: ClassVar[str] = "Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2"

    lr: float = option(2e-4, "Peak learning rate.")
    beta1: float = option(0.9, "Decay of the mean of the gradient.")
    beta2: float = option(0.999, "Decay of the mean of its square.")
    eps: float = option(1e-8, "Added to the root of the second moment.")
    weight_decay: float = option(0.0, "Decoupled decay a step, times the learning rate.")

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A value that cannot train.
        """
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"lr={self.lr} must be positive")
        if not (self.eps >= 0 and self.weight_decay >= 0):
            raise ConfigError(f"eps={self.eps} and weight_decay={self.weight_decay} must not be negative")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ConfigError(f"beta1={self.beta1}, beta2={self.beta2} must be in [0, 1)")

    def build(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Return `torch.optim.AdamW` with two groups: matrices are decayed, vectors are not."""
        named = list(parameters)
        groups = [
            {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            fused=True,
        )

    def state_bytes_per_parameter(self) -> float:
        """Two fp32 moments."""
        return 8.0


@hookimpl
def register_optimisers(register: Register) -> None:
    """Register `adamw`."""
    register("adamw", AdamW)
