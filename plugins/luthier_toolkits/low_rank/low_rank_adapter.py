"""What LoRA and its relatives share: options, their ranges, the scale, and PEFT's names for them."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from luthier.adapters import (
    ALL_LINEAR,
    AdaptedLinear,
    LinearAdapter,
    adapted_layers,
    linear_shape,
    matches,
    value_for,
)
from luthier.errors import ConfigError, ModelError

log = logging.getLogger("luthier")
RENAMED = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
"""What peft takes for experts in ``target_modules``, whatever it is, where transformers has stacked those."""
_MOST = 2.0**127
"""No number of a config is beyond what fp32 holds."""
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
        """Return r and s of the layer `name`; one that `targets` names in full may have any rank.

        Raises:
            ConfigError: The shorter side of another's weight is less than r.
        """
        rank, scale = self.rank_and_scale_of(name)
        # Adapters are read by full names, and PEFT's, as PiSSA's of twice the rank, may be above a weight's.
        if rank > min(linear_shape(base)) and not (isinstance(self.targets, list) and name in self.targets):
            raise ConfigError(
                f"rank={rank} is too much for {name} ({_shape(base)}); lower it or use rank_pattern"
            )
        return rank, scale

    def rank_and_scale_of(self, name: str) -> tuple[int, float]:
        """Return r and s that the options have for `name`."""
        rank = int(value_for(self.rank_pattern, name, self.rank))
        alpha = value_for(self.alpha_pattern, name, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def wrap_all(
        self, bases: Mapping[str, nn.Module], generator: torch.Generator
    ) -> Mapping[str, AdaptedLinear]:
        """Wrap every layer; with ``all-linear`` those too small for their rank are left out and named.

        Raises:
            ConfigError: All are too small.
        """
        small = {
            name: base
            for name, base in bases.items()
            if self.targets == ALL_LINEAR
            and value_for(self.rank_pattern, name, self.rank) > min(linear_shape(base))
        }
        if len(small) < len(bases):
            if small:
                log.warning("too small for their rank, so without an adapter: %s", _named(small))
            bases = {name: base for name, base in bases.items() if name not in small}
        return super().wrap_all(bases, generator)

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """See `LinearAdapter.peft_config`; layers whose rank or α differ are named in full.

        Of patterns that overlap PEFT takes the first one, but saves them in another order.
        """
        config, names = super().peft_config(model), self.patterned(model)
        if renamed := self.renamed(model):
            self.tell_renamed(renamed)
        return config | {
            key: {
                _pattern(shown, names): value
                for shown, name in names.items()
                if (value := value_for(config[key], name, config[usual])) != config[usual]
            }
            for key, usual in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        }

    def renamed(self, model: nn.Module) -> list[str]:
        """Return the layers that peft takes for experts by their names, which are stacked in `model`."""
        layers = [name for name in adapted_layers(model) if name.rpartition(".")[2] in RENAMED]
        return layers if stacks(model) else []

    def tell_renamed(self, layers: list[str]) -> None:
        """Warn of them, where they cannot be named in another way."""
        log.warning(
            "peft may take %d layers, such as %s, for experts, and read this adapter differently; Luthier "
            "reads it as it was trained, and luthier fold makes one model of it for all",
            len(layers), layers[0],
        )  # fmt: skip

    def patterned(self, model: nn.Module) -> dict[str, str]:
        """Return the names by which PEFT looks for ranks and α, and those that the options have them by."""
        return {name: name for name in adapted_layers(model)}

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
            ModelError: A value is missing or no number; or the adapter belongs on a base that its own
                start had changed.
        """
        init = config.get("init_lora_weights", True)
        if init not in _STARTS_BESIDE_THE_BASE:
            way_out = "save it with peft's path_initial_model_for_weight_conversion"
            raise ModelError(f"init_lora_weights='{init}' means a changed base; {way_out}")
        return {
            "rank": _number(config, "r", whole=True),
            "alpha": float(_number(config, "lora_alpha")),
            "dropout": float(_number({"lora_dropout": 0.0, **_without_none(config)}, "lora_dropout")),
            "targets": list(config["target_modules"]),
            "rank_pattern": _numbers(config, "rank_pattern", whole=True),
            "alpha_pattern": _numbers(config, "alpha_pattern"),
            "rank_stabilised": bool(config.get("use_rslora")),
        }


def stacks(model: nn.Module) -> list[str]:
    """Return the names of stacks of matrices, as experts are kept in."""
    names = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    return [name for name in names if ".changes." not in name]


def _number(config: Mapping[str, Any], key: str, whole: bool = False) -> float:
    """Return a number of ``adapter_config.json``."""
    value = config.get(key)
    kinds = int if whole else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not abs(value) < _MOST:
        raise ModelError(f"{key}={value!r}: expected {'a whole' if whole else 'a'} number")
    return value


def _numbers(config: Mapping[str, Any], key: str, whole: bool = False) -> dict[str, Any]:
    """Return a table of numbers of ``adapter_config.json``."""
    table = config.get(key) or {}
    if not isinstance(table, Mapping):
        raise ModelError(f"{key}={table!r}: expected numbers by name")
    return {name: _number(table, name, whole) for name in table}


def _without_none(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}


def _pattern(name: str, names: Collection[str]) -> str:
    """Return what PEFT finds of all `names` in this one alone: it looks at the end of a name."""
    alone = not any(matches(name, other) for other in names if other != name)
    return name if alone else f"^{re.escape(name)}"


def _shape(base: nn.Module) -> str:
    return " × ".join(map(str, linear_shape(base)))


def _named(layers: Mapping[str, nn.Module], count: int = 3) -> str:
    """Return the first `count` of `layers` with their shapes, and how many others there are."""
    shown = ", ".join(f"{name} ({_shape(base)})" for name, base in list(layers.items())[:count])
    return f"{shown} and {len(layers) - count} more" if len(layers) > count else shown
