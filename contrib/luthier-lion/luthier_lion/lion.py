"""Lion: updates by the sign of an interpolated momentum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from luthier import ConfigError, Optimiser, Register, hookimpl, option


class SignMomentum(torch.optim.Optimizer):
    """The update of Lion; see the class of its options."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, beta1: float, beta2: float) -> None:
        super().__init__(groups, {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step over every parameter with a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [(p, p.grad) for p in group["params"] if p.grad is not None]
            if moved:
                self._update([p for p, _ in moved], [gradient for _, gradient in moved], group)
        return loss

    def _update(
        self, parameters: list[torch.Tensor], gradients: list[torch.Tensor], group: dict[str, Any]
    ) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum"] for p in parameters]
        directions = torch._foreach_lerp(gradients, momenta, group["beta1"])  # β₁ m + (1 − β₁) g
        torch._foreach_sign_(directions)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, directions, alpha=-group["lr"])
        torch._foreach_lerp_(momenta, gradients, 1 - group["beta2"])  # β₂ m + (1 − β₂) g


@dataclass(frozen=True)
class Lion(Optimiser):
    """EvoLved sIgn mOmeNtum: ``W ← W − η·(sign(β₁ m + (1 − β₁) g) + λ W)``, then ``m ← β₂ m + (1 − β₂) g``.

    Vectors (norms, biases) are not decayed. Every update has the size of the learning rate: take one 3 to 10
    times smaller than AdamW's.
    """

    source: ClassVar[str] = "Chen et al. 2023, arXiv 2302.06675, algorithm 2; section 5 for the ranges"

    lr: float = option(5e-5, "Peak learning rate: what every weight moves in a step.")
    beta1: float = option(0.9, "Share of the momentum in the update's sign.")
    beta2: float = option(0.99, "Decay of the momentum.")
    weight_decay: float = option(0.0, "Decoupled decay a step, times the learning rate.")

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A value that cannot train.
        """
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"lr={self.lr} must be positive")
        if not self.weight_decay >= 0:
            raise ConfigError(f"weight_decay={self.weight_decay} must not be negative")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ConfigError(f"beta1={self.beta1}, beta2={self.beta2} must be in [0, 1)")

    def build(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Return the optimiser with two groups: matrices are decayed, vectors are not."""
        named = list(parameters)
        groups: list[dict[str, Any]] = [
            {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for _, p in named if p.ndim < 2]},
        ]
        return SignMomentum([g for g in groups if g["params"]], self.lr, self.beta1, self.beta2)

    def state_bytes(self, name: str, shape: tuple[int, ...]) -> float:
        """One fp32 momentum."""
        return 4.0 * math.prod(shape)


@hookimpl
def register_optimisers(register: Register) -> None:
    """Register `lion`."""
    register("lion", Lion)
