"""What the quantisers of bitsandbytes share: the library is there, layers are chosen, and stay as loaded."""

from __future__ import annotations

import functools
import math
import sys
from abc import abstractmethod
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from torch import nn

from luthier.adapters import matches
from luthier.contracts import Quantiser
from luthier.errors import ConfigError
from luthier_toolkits.bitsandbytes.library import BITS_AND_BYTES, require

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Weights that may share a scale in 4 bits."""
_HALF_STEP = 0.2
"""More than half the widest gap of the 4-bit code (0.152), relative to the largest weight of a block."""


class BitsAndBytesQuantiser(Quantiser):
    """A `Quantiser` whose layers are those of bitsandbytes; concrete classes declare `skip` as an option.

    Attributes:
        bits: Of a stored weight: 4 or 8.
        sizes: The blocks of weights that may share a scale in 4 bits.
        skip: Suffix names or regular expressions of layers that stay in the model's dtype.
    """

    bits: ClassVar[int]
    sizes: ClassVar[tuple[int, ...]] = BLOCK_SIZES
    skip: list[str]

    @abstractmethod
    def library_options(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return options of ``BitsAndBytesConfig``, and ``block_size``, for a model in `dtype`."""

    def load_options(self, model_config: Any, dtype: torch.dtype) -> dict[str, Any]:
        """Return ``quantization_config``, which makes transformers quantise each weight as it is read.

        Raises:
            ConfigError: bitsandbytes is missing, or its library for this device is.
        """
        require()
        from luthier_toolkits.bitsandbytes.loading import chosen_layers  # it imports transformers

        options = chosen_layers(self.bits, self.skip, **self.library_options(dtype))
        return {"quantization_config": options}

    @classmethod
    def recognises(cls, method: str) -> bool:
        """Whether bitsandbytes stored it."""
        return method == BITS_AND_BYTES

    @classmethod
    def settle(cls, model: nn.Module) -> None:
        """Keep the layers as they were loaded, whatever runs first; see the function `settle`."""
        settle(model)

    @classmethod
    def weight(cls, layer: nn.Module) -> torch.Tensor | None:
        """See `read_back`."""
        return read_back(layer)

    def quantises(self, name: str) -> bool:
        """Return whether no pattern of `skip` fits the linear layer called `name`."""
        return not any(matches(pattern, name) for pattern in self.skip)


def settle(model: nn.Module) -> None:
    """Keep the 4-bit layers of `model` from changing, and look that this machine reads them right.

    On a CPU with AVX-512 bf16, bitsandbytes packs a layer anew at its first forward pass in eval mode: its
    scales are rounded to bf16, and what comes after has no gradient. Training would depend on whether an
    evaluation came first, and lose what flows through the base.

    Raises:
        ConfigError: bitsandbytes misreads a layer whose rows are no whole blocks.
    """
    bitsandbytes = require()
    for name, layer in model.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False
            size, width, device = layer.weight.blocksize, layer.in_features, layer.weight.device
            if width % size and _misreads(width, size, layer.weight.quant_state.dtype, device):
                fitting = [block for block in BLOCK_SIZES if block < size and width % block == 0]
                smaller = f"choose quantiser.block_size={fitting[-1]}, or " if fitting else ""
                raise ConfigError(
                    f"bitsandbytes {version(BITS_AND_BYTES)} misreads {name} on {device}: its rows of "
                    f"{width} are no whole blocks of {size}; {smaller}leave it out: "
                    f"quantiser.skip=[{name.rpartition('.')[2]}]"
                )


@torch.no_grad()
def read_back(layer: Any) -> torch.Tensor | None:
    """Return the (d_out, d_in) fp32 weight that a layer of bitsandbytes multiplies with; None for others."""
    if BITS_AND_BYTES not in sys.modules:
        return None
    bitsandbytes = require()
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        weight: torch.Tensor = bitsandbytes.functional.dequantize_4bit(
            layer.weight.data, layer.weight.quant_state
        )
        return weight.to(layer.compute_dtype or weight.dtype).float()
    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        codes: torch.Tensor = layer.weight.data
        return codes.float().mul_((scales / 127)[:, None])
    return None


@functools.cache
def _misreads(width: int, size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether rows of `width` come back from blocks of `size` with the scale of another block."""
    functional = require().functional
    count = max(8, math.ceil(4 * size / width))  # rows
    whole = count * width // size * size
    drawn = torch.randn(count * width, generator=torch.Generator().manual_seed(0))
    drawn *= 8.0 ** (torch.arange(count * width) // size % 3)  # no two blocks in turn are alike
    weight = drawn.view(count, width).to(device, dtype)
    back = functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=size, quant_type="nf4"))
    off, blocks = ((tensor.float().flatten()[:whole].view(-1, size)) for tensor in (back - weight, weight))
    return bool((off.abs().amax(1) > _HALF_STEP * blocks.abs().amax(1)).any())
