"""What Adam and its relatives share: options, their ranges, and the groups of parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from luthier.adapters import matches, value_for
from luthier.contracts import Optimiser, option
from luthier.errors import ConfigError, nearest


@dataclass(frozen=True)
class AdamOptimiser(Optimiser):
    """An `Optimiser` with Adam's options. Vectors (norms, biases, magnitudes) are not decayed."""

    lr: float = option(2e-4, "Peak learning rate.")
    beta1: float = option(0.9, "Decay of the mean of the gradient.")
    beta2: float = option(0.999, "Decay of the mean of its square.")
    eps: float = option(1e-8, "Added to the root of the second moment.")
    weight_decay: float = option(0.0, "Decoupled decay a step, times the learning rate.")
    lr_factors: dict[str, float] = option(
        {}, "Factors on lr, by suffix name or regular expression; LoRA+ is lr_factors.lora_B=16."
    )
    no_decay: list[str] = option([], "Matrices not decayed either, by suffix name or regular expression.")

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
        if any(not 0 < factor < math.inf for factor in self.lr_factors.values()):
            raise ConfigError(f"lr_factors={dict(self.lr_factors)} must be positive")

    def groups(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        """Return the parameter groups: one for each weight decay and learning rate that occur.

        Each has ``params``, their ``names``, ``weight_decay`` and ``lr`` (what schedules scale). The first
        one has no factor on its learning rate, if there is such a one.

        Raises:
            ConfigError: A pattern of `lr_factors` or `no_decay` matches no trained parameter.
        """
        named = list(parameters)
        self._check_patterns([name for name, _ in named])
        groups: dict[tuple[float, float], dict[str, Any]] = {}
        for name, parameter in named:
            stays = parameter.ndim < 2 or any(matches(pattern, module_of(name)) for pattern in self.no_decay)
            key = value_for(self.lr_factors, module_of(name), 1.0), 0.0 if stays else self.weight_decay
            fresh = {"params": [], "names": [], "lr": self.lr * key[0], "weight_decay": key[1]}
            group = groups.setdefault(key, fresh)
            group["params"].append(parameter)
            group["names"].append(name)
        return [groups[key] for key in sorted(groups, key=lambda key: (key[0] != 1.0, key[0], -key[1]))]

    def torch_groups(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        """Return `groups` without the names, for optimisers that would keep them in their state."""
        return [
            {key: value for key, value in group.items() if key != "names"}
            for group in self.groups(parameters)
        ]

    def _check_patterns(self, names: list[str]) -> None:
        modules = [module_of(name) for name in names]
        tables: Mapping[str, Iterable[str]] = {"lr_factors": self.lr_factors, "no_decay": self.no_decay}
        for option_name, patterns in tables.items():
            for pattern in patterns:
                if not any(matches(pattern, module) for module in modules):
                    known = sorted({module.rpartition(".")[2] for module in modules})
                    hint = f"{nearest(pattern, known)}trained: {', '.join(known) or 'nothing'}"
                    raise ConfigError(f"{option_name}: '{pattern}' matches no trained parameter: {hint}")


def module_of(parameter: str) -> str:
    """Return what people call a parameter: its name without ``.weight``."""
    return parameter.removesuffix(".weight")
