"""Quantisers: how the frozen base weights are stored."""

from abc import abstractmethod
from typing import Any

from luthier.method import Method


class Quantiser(Method):
    """Loads the base straight into fewer bits."""

    @abstractmethod
    def load_options(self, model_config: Any) -> dict[str, Any]:
        """Return the keyword arguments of transformers' ``from_pretrained`` for a model of `model_config`."""

    @abstractmethod
    def bits_per_weight(self) -> float:
        """Return the bits a quantised weight takes, scales included."""
