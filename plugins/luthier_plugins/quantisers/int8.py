"""int8: 8 bits a weight and a scale a row, by bitsandbytes."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luthier import ConfigError, Register, hookimpl, option
from luthier_toolkits.bitsandbytes import BitsAndBytesQuantiser

WIDTH = 4096
"""The row that `bits_per_weight` is said of; one fp32 scale is 0.008 bits a weight of it."""


class _ReadBack(torch.autograd.Function):
    """y = x Wᵀ + b with W = q · c/127 read back in the dtype of x, again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (…, d_in)
        codes: Tensor,  # q (d_out, d_in), int8
        scales: Tensor,  # c (d_out,), fp32
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return F.linear(x, _weight(codes, scales, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales = ctx.saved_tensors
        return grad @ _weight(codes, scales, grad.dtype), None, None, None


def _weight(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.to(dtype).mul_((scales / 127)[:, None])  # a code is exact in any dtype: rounded once


@functools.cache
def _read_back() -> type[nn.Module]:
    """Return bitsandbytes' layer that leaves its inputs as they are; importing it takes a second."""
    from bitsandbytes.nn.modules import Linear8bitLt

    layer: Any = Linear8bitLt  # which bitsandbytes leaves untyped

    class ReadBack8bit(layer):  # type: ignore[misc]
        """Multiplies with the weight as it reads back, in training and out of it."""

        def forward(self, x: Tensor) -> Tensor:
            """Map x (…, d_in) to (…, d_out)."""
            y: Tensor = _ReadBack.apply(x, self.weight.data, self.weight.SCB, self.bias)  # type: ignore[no-untyped-call]
            return y

    return ReadBack8bit


@dataclass(frozen=True)
class Int8(BitsAndBytesQuantiser):
    """Weights as ``W ≈ q · c/127``: q an 8-bit integer, c the largest absolute value of the row.

    With a threshold, inputs are quantised too (on the CPU out of training only), but for features where a
    value is beyond it. What an example gives then depends on the others in its pack, and a model where that
    shows is refused.
    """

    source: ClassVar[str] = "LLM.int8(): Dettmers et al. 2022, arXiv 2208.07339, sections 2 and 3"
    bits: ClassVar[int] = 8

    threshold: float | None = option(
        None, "Quantise the inputs too, but for features beyond this (6 in the paper); null: weights alone."
    )
    skip: list[str] = option(
        [], "Layers to leave in the model's dtype, by suffix name or regular expression; the head always is."
    )

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ConfigError: A threshold that cannot be meant.
        """
        if self.threshold is not None and not 0 <= self.threshold < math.inf:
            raise ConfigError(f"threshold={self.threshold} must not be negative; 0 quantises every feature")

    def library_options(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return transformers' options."""
        return {"llm_int8_threshold": self.threshold or 0.0}

    def finish(self, model: nn.Module) -> None:
        """Without a threshold, make the layers leave their inputs as they are."""
        super().finish(model)
        for layer in model.modules() if self.threshold is None else ():
            if type(layer) is _read_back().__base__:
                layer.__class__ = _read_back()

    def bits_per_weight(self) -> float:
        """8 and a share of the row's fp32 scale."""
        return 8 + 32 / WIDTH


@hookimpl
def register_quantisers(register: Register) -> None:
    """Register `int8`."""
    register("int8", Int8)
