"""GaLore: Adam's moments of every matrix live in a subspace of its gradient.

Deliberately missing: projecting tensors of three dimensions (fused experts), which get plain AdamW, and
moments in eight bits.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from luthier import ConfigError, Register, hookimpl, is_target, option, select_matrices
from luthier_plugins.optimisers.galore.layerwise import ProjectedAdamInBackward
from luthier_plugins.optimisers.galore.projected_adam import ProjectedAdam
from luthier_toolkits.adam import AdamOptimiser, module_of

log = logging.getLogger("luthier")


@dataclass(frozen=True)
class GaLore(AdamOptimiser):
    """Gradient low-rank projection: with P the leading singular vectors of G on its shorter side, R = PᵀG and
    N̂ Adam's direction of R, ``W ← W − η·s·P N̂``. What is no target gets plain AdamW.
    """

    source: ClassVar[str] = (
        "Zhao et al. 2024, arXiv 2403.03507, algorithm 2; subspace: Halko et al. 2011, arXiv 0909.4061, "
        "algorithm 4.4; layerwise: Lv et al. 2023, arXiv 2306.09782"
    )
    refuses: ClassVar[Mapping[str, str]] = {
        "adapter.trains_base=False": "an adapter's gradients are small as they are: choose adapter=full, or "
        "optimiser=adamw beside the adapter"
    }
    skips_non_finite: ClassVar[bool] = True
    needs_whole_parameters: ClassVar[bool] = True
    after_backward: ClassVar[str] = "optimiser.layerwise=false"

    rank: int = option(128, "Rank r of the subspace; all-linear leaves out matrices with a shorter side.")
    refresh_every: int = option(200, "Steps T between two bases of a matrix; matrices take turns.")
    scale: float = option(0.25, "Factor s on the update of a projected matrix; the paper's α.")
    svd: Literal["subspace", "exact"] = option(
        "subspace", "Basis by three subspace iterations from the last one, or by a full decomposition."
    )
    layerwise: bool = option(
        False,
        "Step every parameter inside the backward pass and free its gradient; needs max_grad_norm=null.",
    )
    rotate_moments: bool = option(True, "Take the moments along into a new basis; the paper keeps them.")
    targets: Any = option("all-linear", "Suffix names, a regular expression, or all-linear.")

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A value that cannot train.
        """
        super().__post_init__()
        if self.rank < 1 or self.refresh_every < 1:
            raise ConfigError(f"rank={self.rank} and refresh_every={self.refresh_every} must be at least 1")
        if not 0 < self.scale < math.inf:
            raise ConfigError(f"scale={self.scale} must be positive")

    @property
    def steps_in_backward(self) -> bool:
        """With `layerwise`."""
        return self.layerwise

    def build(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Return a `ProjectedAdam`, with `layerwise` one that steps inside the backward pass.

        Raises:
            ConfigError: A pattern matches nothing, or a target's shorter side is less than the rank.
        """
        named = list(parameters)
        chosen = self._chosen({name: tuple(p.shape) for name, p in named})
        cls = ProjectedAdamInBackward if self.layerwise else ProjectedAdam
        return cls(
            self._split(self.groups(named), chosen),
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            refresh_every=self.refresh_every,
            scale=self.scale,
            exact=self.svd == "exact",
            rotate_moments=self.rotate_moments,
        )

    def state_bytes(self, name: str, shape: tuple[int, ...]) -> float:
        """Of a target the basis and two moments of R, else two moments; all fp32."""
        projected = len(shape) == 2 and is_target(self.targets, module_of(name))
        if not projected or self._too_small(shape):
            return 8.0 * math.prod(shape)
        return 4.0 * min(self.rank, *shape) * (min(shape) + 2 * max(shape))

    def _chosen(self, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
        """Return the names of the parameters that are projected; of ``all-linear`` those large enough."""
        modules = {module_of(name): name for name, shape in shapes.items() if len(shape) == 2}
        chosen = {modules[module] for module in select_matrices(modules, self.targets)}
        small = {name for name in chosen if self._too_small(shapes[name])}
        if small and small != chosen:
            log.warning("smaller than rank=%d, so not projected: %s", self.rank, ", ".join(sorted(small)[:3]))
            chosen -= small
        for name in shapes:
            if name in chosen and self.rank > min(shapes[name]):
                shape = "×".join(map(str, shapes[name]))
                raise ConfigError(
                    f"rank={self.rank} is more than the shorter side of {name} ({shape}): lower "
                    "optimiser.rank, or leave it out of optimiser.targets"
                )
        return chosen

    def _too_small(self, shape: tuple[int, ...]) -> bool:
        """Whether ``all-linear`` leaves a matrix of this shape, as a router's, as it is."""
        return self.targets == "all-linear" and self.rank > min(shape)

    def _split(self, groups: list[dict[str, Any]], chosen: set[str]) -> list[dict[str, Any]]:
        """Return every group as two, what is projected and what is not, without empty ones."""
        parts = []
        for group in groups:
            for rank in (self.rank, 0):
                inside = [
                    p
                    for name, p in zip(group["names"], group["params"], strict=True)
                    if (name in chosen) == bool(rank)
                ]
                rates = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
                parts.append({"params": inside, "rank": rank, **rates})
        return [part for part in parts if part["params"]]


@hookimpl
def register_optimisers(register: Register) -> None:
    """Register `galore`."""
    register("galore", GaLore)
