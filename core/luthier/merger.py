"""Mergers: one tensor out of the same tensor of several models."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from luthier.method import Method


class Merger(Method):
    """Merges tensor by tensor.

    Attributes:
        needs_base: The method works on differences to a base model, which must then be given.
        least_inputs: How many models it needs at least.
        symmetric: The order of the models is without effect.
    """

    needs_base: ClassVar[bool] = False
    least_inputs: ClassVar[int] = 1
    symmetric: ClassVar[bool] = True

    @abstractmethod
    def merge(self, name: str, inputs: Sequence[torch.Tensor], base: torch.Tensor | None) -> torch.Tensor:
        """Return the merged tensor, in float32 and of the inputs' shape.

        Args:
            name: The tensor's name, for seeds and messages.
            inputs: The tensor of that name in every model, float32, all of one shape.
            base: The base model's tensor; None unless `needs_base`.
        """
