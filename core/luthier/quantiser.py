"""Quantisers: how the frozen base weights are stored."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import nn

from luthier.method import Method


class Quantiser(Method):
    """Loads the base straight into fewer bits."""

    @abstractmethod
    def load_options(self, model_config: Any, dtype: torch.dtype) -> dict[str, Any]:
        """Return the keyword arguments of transformers' ``from_pretrained``.

        Args:
            model_config: The config of the model that is loaded; not changed.
            dtype: What the model computes in.

        Raises:
            ConfigError: The library that quantises lacks what this machine needs; how to get it.
        """

    def finish(self, model: nn.Module) -> None:
        """Make the loaded `model` ready to train; called once, right after loading."""

    def quantises(self, name: str) -> bool:
        """Return whether the linear layer called `name` is quantised; the output head never is."""
        return True

    @abstractmethod
    def bits_per_weight(self) -> float:
        """Return the bits a quantised weight takes, scales included."""
