"""Adapters: which parameters train, and how a linear layer is changed for it."""

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from luthier.method import Method


class Adapter(Method):
    """Decides what trains.

    Attributes:
        trains_base: The base weights themselves train, so they are kept in fp32 under autocast.
    """

    trains_base: ClassVar[bool] = False

    @abstractmethod
    def attach(self, model: nn.Module, generator: torch.Generator) -> None:
        """Change `model` in place; afterwards exactly the trained parameters have ``requires_grad``."""

    @abstractmethod
    def save(self, model: nn.Module, folder: Path, base: str) -> None:
        """Write what was trained to `folder` in a format other tools read; `base` names the base model."""
