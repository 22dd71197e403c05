"""DoRA: LoRA beside a weight whose rows have lengths of their own, which train.

Deliberately missing: initialisations other than Kaiming, adapted embeddings and convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from luthier import AdaptedLinear, Register, copy_state, hookimpl, option, weight_of
from luthier_plugins.adapters.dora.row_norms import row_norms, squared_row_norms
from luthier_plugins.adapters.dora.weight_norm import weight_normed_linear
from luthier_toolkits.low_rank import LowRankAdapter


class DoRALinear(AdaptedLinear):
    """``c ⊙ (W x + s·B A dropout(x)) + bias``, ``c = m / ‖W + s·B A‖`` for every output row.

    A is (r, d_in), B (d_out, r) and the magnitude m (d_out,), all fp32. Dropout leaves W x as it is, where
    PEFT scales what is left of it.
    """

    squared: Tensor

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__(base)
        self.scale, self.dropout = scale, dropout
        like = torch.empty((), dtype=torch.float32, device=weight_of(base).device)
        self.lora_A = nn.Parameter(like.new_zeros(rank, self.in_features))
        self.lora_B = nn.Parameter(like.new_zeros(self.out_features, rank))
        self.register_buffer("squared", squared_row_norms(base), persistent=False)
        self.magnitude = nn.Parameter(self._norms())
        self.remembered: tuple[Any, Tensor] | None = None

    def adapted(self, x: Tensor) -> Tensor:
        """Map x (…, d_in) to (…, d_out)."""
        dropped = F.dropout(x, self.dropout) if self.training and self.dropout else None
        factors = self.lora_A, self.lora_B, self.magnitude
        return weight_normed_linear(self.base, x, *factors, self.norms(), self.scale, dropped)

    def norms(self) -> Tensor:
        """Return ‖W + s·B A‖ (d_out,); remembered while nothing trains, as for every token of an answer."""
        if self.training or torch.is_grad_enabled():
            self.remembered = None
            return self._norms()
        now = [(tensor.data_ptr(), tensor._version) for tensor in (self.lora_A, self.lora_B, self.squared)]
        if self.remembered is None or self.remembered[0] != now:
            self.remembered = now, self._norms()
        return self.remembered[1]

    def train(self, mode: bool = True) -> DoRALinear:
        """Set the mode, and forget the norms."""
        self.remembered = None
        return super().train(mode)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return c ⊙ (W + s·B A), fp32."""
        weight = self.base_weight().addmm(self.lora_B, self.lora_A, alpha=self.scale)
        return weight.mul_((self.magnitude / self._norms())[:, None])

    def adapter_state(self) -> dict[str, Tensor]:
        """Return A, B and m as PEFT names them."""
        return {name: tensor.detach() for name, tensor in self._tensors().items()}

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy A, B and m in; ModelError if they do not fit."""
        copy_state(self._tensors(), state)

    @torch.no_grad()
    def start_kaiming(self, generator: torch.Generator) -> None:
        """A Kaiming-uniform with a = √5, B zero. Drawn on the CPU: the same on every device."""
        drawn = torch.empty(self.lora_A.shape)
        self.lora_A.copy_(nn.init.kaiming_uniform_(drawn, math.sqrt(5), generator=generator))

    def _norms(self) -> Tensor:
        return row_norms(self.base, self.squared, self.lora_A, self.lora_B, self.scale)

    def _tensors(self) -> dict[str, Tensor]:
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B,
                "lora_magnitude_vector": self.magnitude}  # fmt: skip


@dataclass(frozen=True)
class DoRA(LowRankAdapter):
    """Weight-decomposed adaptation: ``y = m/‖W + s·B A‖ ⊙ (W x + s·B A dropout(x)) + b``, s as in LoRA."""

    source: ClassVar[str] = (
        "Liu et al. 2024, arXiv 2402.09353, equations 5 and 11; rank_stabilised: Kalajdzievski 2023, "
        "arXiv 2312.03732"
    )
    peft_kind: ClassVar[str] = "LORA+use_dora"

    rank: int = option(16, "Rank r of the update.")
    alpha: float = option(32.0, "α; the update is scaled by α/r.")
    dropout: float = option(0.05, "Share of the inputs of A that is dropped in training; 0 is faster.")
    targets: Any = option("all-linear", "Suffix names, a regular expression, or all-linear.")
    rank_pattern: dict[str, int] = option({}, "Other ranks, by suffix name or regular expression.")
    alpha_pattern: dict[str, float] = option({}, "Other values of α, by suffix name or regular expression.")
    rank_stabilised: bool = option(False, "Scale by α/√r, which lets high ranks learn.")

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ConfigError: A value that cannot train.
        """
        self.check_ranges()

    def wrap(self, name: str, base: nn.Module, generator: torch.Generator) -> DoRALinear:
        """Return `base` with an update that is zero and the lengths it has; A, B and m trainable."""
        layer = DoRALinear(base, *self.rank_and_scale(name, base), self.dropout)
        layer.start_kaiming(generator)
        return layer

    def peft_method(self) -> dict[str, Any]:
        """PEFT's options of LoRA; ``use_dora`` comes from `peft_kind`."""
        return self.low_rank_config()

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> DoRA:
        """Return the adapter of PEFT's options.

        Raises:
            ModelError: It belongs on a base that its own start had changed.
        """
        return cls(**cls.options_from_peft(config))


@hookimpl
def register_adapters(register: Register) -> None:
    """Register `dora`."""
    register("dora", DoRA)
