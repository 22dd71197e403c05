"""Optimisers: what moves the trained parameters."""

from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import nn

from luthier.method import Method


class Optimiser(Method):
    """Builds a `torch.optim.Optimizer`."""

    @abstractmethod
    def build(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Return an optimiser over the trained ``(name, parameter)`` pairs."""

    @abstractmethod
    def state_bytes_per_parameter(self) -> float:
        """Return the bytes of optimiser state that one trained parameter costs."""
