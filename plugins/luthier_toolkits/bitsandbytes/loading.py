"""How transformers loads a model into layers of bitsandbytes: which, in what blocks, in little memory."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from luthier.adapters import ALL_LINEAR, matches, select
from luthier.errors import ConfigError, nearest
from luthier_toolkits.bitsandbytes.library import BITS_AND_BYTES


class _Options(BitsAndBytesConfig):  # type: ignore[misc]
    """transformers' options, and the choice of layers that our loaders below make."""

    def __init__(self, bits: int, skip: Sequence[str], block_size: int = 64, **options: Any) -> None:
        super().__init__(**{f"load_in_{bits}bit": True}, **options)
        self.quant_method = f"luthier_{bits}bit"
        self.skip, self.block_size = list(skip), block_size

    def choose(self, model: nn.Module) -> None:
        """Name the linear layers of `model` that stay as they are: the output head, and what is skipped.

        Raises:
            ConfigError: A pattern fits no layer.
        """
        among = select(model, ALL_LINEAR)
        skipped = {name for name in among if any(matches(pattern, name) for pattern in self.skip)}
        for pattern in self.skip:
            if not any(matches(pattern, name) for name in among):
                last = {name.rpartition(".")[2] for name in among}
                raise ConfigError(
                    f"skip={pattern} fits no linear layer: {nearest(pattern, last)}known: "
                    f"{', '.join(sorted(last))}; the output head is never quantised"
                )
        linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
        stay = [name for name in linears if name not in among or name in skipped]
        # transformers takes patterns, and where it is given any it no longer leaves out the head by itself.
        self.llm_int8_skip_modules = [re.escape(name) for name in stay]


class _Trimmed(ConversionOps):  # type: ignore[misc]
    """Quantises a weight and gives back what that took.

    The C library keeps freed memory, in pieces between the small results: more than the model in bf16.
    """

    def __init__(self, quantise: Any) -> None:
        self.quantise = quantise

    def convert(self, *tensors: Any, **more: Any) -> Any:
        done = self.quantise.convert(*tensors, **more)
        _trim()(0)
        return done


@functools.cache
def _trim() -> Callable[[int], object]:
    try:
        trim: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library
        return lambda keep: None
    return trim


class _Loading:
    """What our loaders add to transformers' own: exact layers, blocks of any size, a usual config after."""

    quantization_config: Any

    def _process_model_before_weight_loading(self, model: nn.Module, **more: Any) -> None:
        self.quantization_config.choose(model)
        super()._process_model_before_weight_loading(model, **more)  # type: ignore[misc]
        from bitsandbytes.nn.modules import Linear4bit

        for layer in model.modules():
            if isinstance(layer, Linear4bit):
                weight: Any = layer.weight  # a Params4bit, which bitsandbytes leaves untyped
                weight.blocksize = self.quantization_config.block_size

    def _process_model_after_weight_loading(self, model: Any, **more: Any) -> Any:
        self.quantization_config.quant_method = model.quantization_method = BITS_AND_BYTES
        return super()._process_model_after_weight_loading(model, **more)  # type: ignore[misc]

    def get_quantize_ops(self) -> Any:
        return _Trimmed(super().get_quantize_ops())  # type: ignore[misc]


class _Loading4(_Loading, Bnb4BitHfQuantizer):  # type: ignore[misc]
    """Into 4 bits."""


class _Loading8(_Loading, Bnb8BitHfQuantizer):  # type: ignore[misc]
    """Into 8 bits."""


def chosen_layers(bits: int, skip: Sequence[str], **options: Any) -> BitsAndBytesConfig:
    """Return a ``quantization_config`` that loads all linear layers but the output head into `bits`.

    Args:
        bits: 4 or 8.
        skip: Suffix names or regular expressions of layers to leave in the model's dtype.
        options: Those of transformers' ``BitsAndBytesConfig``, and ``block_size``.
    """
    _register()
    return _Options(bits, skip, **options)


@functools.cache
def _register() -> None:
    """Tell transformers of our loaders, once a process and only where one is used."""
    register_quantizer("luthier_4bit")(_Loading4)
    register_quantizer("luthier_8bit")(_Loading8)
