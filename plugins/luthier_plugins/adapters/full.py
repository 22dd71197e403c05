"""Full fine-tuning: no adapter, every parameter trains."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import nn

from luthier import Adapter, Register, hookimpl, option, refuse_adapted
from luthier_toolkits.saving import save_model


@dataclass(frozen=True)
class Full(Adapter):
    """Every parameter trains: master weights in fp32, computing in the model's dtype by autocast.

    The result is a whole model in transformers' layout.
    """

    source: ClassVar[str] = "fp32 master weights: Micikevicius et al. 2018, arXiv 1710.03740, section 3.1"
    refuses: ClassVar[Mapping[str, str]] = {"quantiser=*": "adapter=lora, which trains beside frozen weights"}
    trains_base: ClassVar[bool] = True

    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "The dtype of the saved weights; auto: the one they train in, so nothing is rounded."
    )

    def attach(self, model: nn.Module, generator: torch.Generator) -> None:
        """Let every parameter train.

        Raises:
            ConfigError: The model carries an adapter.
        """
        refuse_adapted(model)
        model.requires_grad_(True)

    def save(self, model: nn.Module, folder: Path, base: str) -> None:
        """Write the model in transformers' layout, which reads back exactly.

        Raises:
            ModelError: It does not.
        """
        dtype: torch.dtype | None = None if self.save_dtype == "auto" else getattr(torch, self.save_dtype)
        save_model(model, None, folder, dtype)


@hookimpl
def register_adapters(register: Register) -> None:
    """Register `full`."""
    register("full", Full)
