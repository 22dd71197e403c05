"""What LoRA and its relatives share: options, their ranges, the scale, and PEFT's names for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from luthier.adapters import LinearAdapter, linear_shape, value_for
from luthier.errors import ConfigError, ModelError

_STARTS_BESIDE_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")


class LowRankAdapter(LinearAdapter):
    """A `LinearAdapter` whose update is ``s·B A`` of rank r, with s = α/r, or α/√r if rank-stabilised.

    Concrete classes declare these attributes as options.

    Attributes:
        rank: r.
        alpha: α.
        dropout: Share of the inputs of A that is dropped in training.
        rank_pattern: Other ranks, by suffix name or regular expression.
        alpha_pattern: Other values of α, by suffix name or regular expression.
        rank_stabilised: Scale by α/√r.
    """

    peft_options: ClassVar[frozenset[str]] = frozenset(
        {"r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "init_lora_weights"}
    )
    rank: int
    alpha: float
    dropout: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    rank_stabilised: bool

    def check_ranges(self) -> None:
        """Check the options.

        Raises:
            ConfigError: A value that cannot train.
        """
        if any(rank < 1 for rank in (self.rank, *self.rank_pattern.values())):
            raise ConfigError(f"rank={self.rank}, rank_pattern={self.rank_pattern} must be at least 1")
        if any(alpha <= 0 for alpha in (self.alpha, *self.alpha_pattern.values())):
            raise ConfigError(f"alpha={self.alpha}, alpha_pattern={self.alpha_pattern} must be positive")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} must be in [0, 1)")

    def rank_and_scale(self, name: str, base: nn.Module) -> tuple[int, float]:
        """Return r and s of the layer `name`.

        Raises:
            ConfigError: Its weight's shorter side is less than r.
        """
        rank = int(value_for(self.rank_pattern, name, self.rank))
        if rank > min(linear_shape(base)):
            shape = " × ".join(map(str, linear_shape(base)))
            raise ConfigError(f"rank={rank} is too much for {name} ({shape}); lower it or use rank_pattern")
        alpha = value_for(self.alpha_pattern, name, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def low_rank_config(self, rank_factor: int = 1) -> dict[str, Any]:
        """Return PEFT's options; ranks are `rank_factor` times these, at the same scale s."""
        alpha_factor = math.sqrt(rank_factor) if self.rank_stabilised else rank_factor
        return {
            "r": rank_factor * self.rank,
            "lora_alpha": alpha_factor * self.alpha,
            "lora_dropout": self.dropout,
            "rank_pattern": {key: rank_factor * rank for key, rank in self.rank_pattern.items()},
            "alpha_pattern": {key: alpha_factor * alpha for key, alpha in self.alpha_pattern.items()},
            "use_rslora": self.rank_stabilised,
            "init_lora_weights": True,
        }

    @staticmethod
    def options_from_peft(config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options that `config`, an ``adapter_config.json``, means.

        Raises:
            ModelError: The adapter belongs on a base that its own start had changed.
        """
        init = config.get("init_lora_weights", True)
        if init not in _STARTS_BESIDE_THE_BASE:
            way_out = "save it with peft's path_initial_model_for_weight_conversion"
            raise ModelError(f"init_lora_weights='{init}' means a changed base; {way_out}")
        return {
            "rank": config["r"],
            "alpha": float(config["lora_alpha"]),
            "dropout": config.get("lora_dropout") or 0.0,
            "targets": list(config["target_modules"]),
            "rank_pattern": config.get("rank_pattern") or {},
            "alpha_pattern": config.get("alpha_pattern") or {},
            "rank_stabilised": bool(config.get("use_rslora")),
        }
