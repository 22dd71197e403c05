"""Quantisers: how the frozen base weights are stored."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import nn

from luthier.contracts.method import Method


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

    @classmethod
    def recognises(cls, method: str) -> bool:
        """Whether a checkpoint that was stored by `method`, as transformers calls it, is of this kind."""
        return False

    @classmethod
    def settle(cls, model: nn.Module) -> None:
        """Make a `model` ready to train that was loaded from a checkpoint of a kind it `recognises`."""

    def finish(self, model: nn.Module) -> None:
        """Make a `model` ready to train that was loaded with its options; called once, right after."""
        self.settle(model)

    @classmethod
    def weight(cls, layer: nn.Module) -> torch.Tensor | None:
        """Return the (d_out, d_in) fp32 weight that a `layer` of its own multiplies with; None for others."""
        return None

    def quantises(self, name: str) -> bool:
        """Return whether the linear layer called `name` is quantised; the output head never is."""
        return True

    @abstractmethod
    def bits_per_weight(self) -> float:
        """Return the bits a quantised weight takes, scales included."""
