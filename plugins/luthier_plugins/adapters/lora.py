"""LoRA: a low-rank update beside every frozen linear layer, and of embeddings and experts.

Deliberately missing: initialisations other than Kaiming and PiSSA, biases that train.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from luthier import AdaptedLinear, ConfigError, ModelError, Register, copy_state, hookimpl, option, weight_of
from luthier_toolkits.low_rank import LowRankParameters, low_rank_linear, principal_part


class LoRALinear(AdaptedLinear):
    """``base(x) + s·B A dropout(x)``; PiSSA starts at A₀, B₀ ≠ 0 and adds ``−s·B₀ A₀ x``.

    That is the base less its principal part, but leaves the base itself as it is: quantised, shared, and
    the reference when the adapter is off. A is (r, d_in) and B (d_out, r), both fp32.
    """

    start_A: Tensor | None  # noqa: N815
    start_B: Tensor | None  # noqa: N815

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__(base)
        self.scale, self.dropout = scale, dropout
        like = torch.empty((), dtype=torch.float32, device=weight_of(base).device)
        self.lora_A = nn.Parameter(like.new_zeros(rank, self.in_features))
        self.lora_B = nn.Parameter(like.new_zeros(self.out_features, rank))
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)

    def adapted(self, x: Tensor) -> Tensor:
        """Map x (…, d_in) to (…, d_out); one autograd function unless dropout is at work."""
        if not (self.training and self.dropout):
            return low_rank_linear(self.base, x, *self.factors(), self.scale)
        y: Tensor = self.base(x)
        u = F.linear(F.dropout(x, self.dropout), self.lora_A.to(x.dtype))  # (…, r)
        if self.start_A is not None:
            u = torch.cat([u, F.linear(x, self.start_A.to(x.dtype))], -1)
        return y + (self.scale * F.linear(u, self.factors()[1].to(x.dtype))).to(y.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return [A; A₀] (r or 2r, d_in) and [B, −B₀] (d_out, r or 2r): B A is the change so far."""
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.start_A]), torch.cat([self.lora_B, self.start_B], 1)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + s·B A (− s·B₀ A₀), fp32."""
        return torch.addmm(self.base_weight(), *self.low_rank())

    @torch.no_grad()
    def low_rank(self) -> tuple[Tensor, Tensor]:
        """s·[B, −B₀] and [A; A₀]."""
        a, b = self.factors()
        return self.scale * b, a

    def adapter_state(self) -> dict[str, Tensor]:
        """``lora_A.weight``, ``lora_B.weight``; of rank 2r for PiSSA, to load on the unchanged base."""
        a, b = self.factors()
        return {"lora_A.weight": a.detach(), "lora_B.weight": b.detach()}

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy A and B in; ModelError if they do not fit."""
        if self.start_A is not None:
            raise ModelError("a saved PiSSA adapter is a LoRA of twice the rank; load it as that")
        copy_state({"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}, state)

    @torch.no_grad()
    def start_kaiming(self, generator: torch.Generator) -> None:
        """A Kaiming-uniform with a = √5, B zero. Drawn on the CPU: the same on every device."""
        drawn = torch.empty(self.lora_A.shape)
        self.lora_A.copy_(nn.init.kaiming_uniform_(drawn, math.sqrt(5), generator=generator))

    @torch.no_grad()
    def start_pissa(self, generator: torch.Generator) -> None:
        """``s·B₀ A₀ = U_r S_r V_rᵀ``, the principal part of W."""
        if not self.lora_A.is_meta:  # shapes alone have no principal part
            b, a = principal_part(self.base_weight() / self.scale, self.lora_A.shape[0], generator)
            self.lora_A.copy_(a)
            self.lora_B.copy_(b)
        self.start_A, self.start_B = self.lora_A.detach().clone(), -self.lora_B.detach()


@dataclass(frozen=True)
class LoRA(LowRankParameters):
    """Low-rank adaptation: ``y = W x + b + s·B A dropout(x)``, s = α/r (α/√r if rank-stabilised)."""

    source: ClassVar[str] = (
        "Hu et al. 2021, arXiv 2106.09685, section 4.1; rank_stabilised: Kalajdzievski 2023, "
        "arXiv 2312.03732; pissa: Meng et al. 2024, arXiv 2404.02948, section 3"
    )
    peft_kind: ClassVar[str] = "LORA"

    rank: int = option(16, "Rank r of the update.")
    alpha: float = option(32.0, "α; the update is scaled by α/r.")
    dropout: float = option(0.05, "Share of the inputs of A that is dropped in training; 0 is faster.")
    targets: Any = option(
        "all-linear", "Suffix names (of embeddings too), a regular expression, or all-linear."
    )
    rank_pattern: dict[str, int] = option({}, "Other ranks, by suffix name or regular expression.")
    alpha_pattern: dict[str, float] = option({}, "Other values of α, by suffix name or regular expression.")
    rank_stabilised: bool = option(False, "Scale by α/√r, which lets high ranks learn.")
    target_parameters: list[str] = option(
        [], "Experts: ends of parameters' names (mlp.experts.down_proj); needs dropout=0."
    )
    init: Literal["kaiming", "pissa"] = option("kaiming", "Start at zero, or at the weight's principal part.")

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ConfigError: A value that cannot train.
        """
        self.check_ranges()
        if self.target_parameters and (self.dropout or self.init == "pissa"):
            raise ConfigError("target_parameters go with dropout=0 and init=kaiming alone, as in PEFT")

    def wrap(self, name: str, base: nn.Module, generator: torch.Generator) -> LoRALinear:
        """Return `base` with an update that is zero, A and B trainable."""
        layer = LoRALinear(base, *self.rank_and_scale(name, base), self.dropout)
        (layer.start_pissa if self.init == "pissa" else layer.start_kaiming)(generator)
        return layer

    def peft_method(self) -> dict[str, Any]:
        """PEFT's options of LoRA; a PiSSA adapter is written with twice the rank at the same scale."""
        return self.low_rank_config(rank_factor=2 if self.init == "pissa" else 1)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> LoRA:
        """Return the adapter of PEFT's options; ModelError if its start had changed its base."""
        return cls(**cls.options_from_peft(config))


@hookimpl
def register_adapters(register: Register) -> None:
    """Register `lora`."""
    register("lora", LoRA)
