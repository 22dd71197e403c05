"""NF4: 4-bit NormalFloat, by bitsandbytes; QLoRA is this and LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from luthier import ConfigError, Register, hookimpl, option
from luthier_toolkits.bitsandbytes import BitsAndBytesQuantiser

NESTED = 256
"""Scales that share a scale of their own under double quantisation."""


@dataclass(frozen=True)
class NF4(BitsAndBytesQuantiser):
    """Weights as one of 16 quantiles of the normal distribution, times a scale that a block shares.

    ``W ≈ q · c``: q in [−1, 1] by its 4-bit number, c the largest absolute value of the block. With double
    quantisation c is 8 bits and a share of an fp32 scale for 256 of them.
    """

    source: ClassVar[str] = "Dettmers et al. 2023, arXiv 2305.14314, sections 3 and appendix E"
    bits: ClassVar[int] = 4

    double_quant: bool = option(True, "Quantise the scales too: 4.127 bits a weight in place of 4.5.")
    block_size: int = option(64, "Weights that share a scale: 32, 64 … 4096; more is smaller and coarser.")
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "What a layer multiplies in; auto: the model's dtype."
    )
    skip: list[str] = option(
        [], "Layers to leave in the model's dtype, by suffix name or regular expression; the head always is."
    )

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ConfigError: bitsandbytes has no such blocks.
        """
        if self.block_size not in self.sizes:
            allowed = ", ".join(map(str, self.sizes))
            raise ConfigError(f"block_size={self.block_size}: bitsandbytes has blocks of {allowed}")

    def library_options(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return transformers' options."""
        computes = dtype if self.compute_dtype == "auto" else self.compute_dtype
        return {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": computes,
            "bnb_4bit_use_double_quant": self.double_quant,
            "block_size": self.block_size,
        }

    def bits_per_weight(self) -> float:
        """4 and a share of the block's scale: 32 bits, or 8 and a share of the next scale's 32."""
        scale = 8 + 32 / NESTED if self.double_quant else 32
        return 4 + scale / self.block_size


@hookimpl
def register_quantisers(register: Register) -> None:
    """Register `nf4`."""
    register("nf4", NF4)
