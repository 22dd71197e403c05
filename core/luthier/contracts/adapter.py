"""Adapters: which parameters train, and how a linear layer is changed for it."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from luthier.contracts.method import Method
from luthier.errors import ModelError


class Adapter(Method):
    """Decides what trains.

    Attributes:
        trains_base: The base weights themselves train, so they are kept in fp32 under autocast.
        peft_kind: The kind of PEFT folder it reads and writes: PEFT's ``peft_type``, followed by ``+use_x``
            for a flag that makes it another method: ``LORA``, ``LORA+use_dora``. None: no such folder.
    """

    trains_base: ClassVar[bool] = False
    peft_kind: ClassVar[str | None] = None

    @classmethod
    def load(cls, model: nn.Module, folder: Path, trainable: bool) -> Adapter:
        """Attach the adapter saved in `folder` to `model`, and return it.

        Args:
            model: The base model.
            folder: One of the kind `peft_kind`.
            trainable: Whether its weights go on training.

        Raises:
            ModelError: The folder is incomplete or damaged, or does not fit the model.
        """
        raise ModelError(f"{folder}: {cls.__name__} reads no folder")

    @abstractmethod
    def attach(self, model: nn.Module, generator: torch.Generator) -> None:
        """Change `model` in place; afterwards exactly the trained parameters have ``requires_grad``."""

    @abstractmethod
    def save(self, model: nn.Module, folder: Path, base: str) -> None:
        """Write what was trained to `folder` in a format other tools read; `base` names the base model."""
