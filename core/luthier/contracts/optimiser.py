"""Optimisers: what moves the trained parameters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import nn

from luthier.contracts.method import Method


class Optimiser(Method):
    """Builds a `torch.optim.Optimizer`.

    Attributes:
        skips_non_finite: A step whose gradient is not finite is left out by the optimiser itself, which
            counts it (``skipped`` of its `torch.optim.Optimizer`); elsewhere such a gradient ends the run.
        needs_whole_parameters: It looks at whole matrices, which a process of a sharded run does not have.
        after_backward: What to choose for steps after the backward pass, where `steps_in_backward` can be
            true: ``"optimiser.layerwise=false"``.
    """

    skips_non_finite: ClassVar[bool] = False
    needs_whole_parameters: ClassVar[bool] = False
    after_backward: ClassVar[str] = "another optimiser"

    @abstractmethod
    def build(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Return an optimiser over the trained ``(name, parameter)`` pairs."""

    @abstractmethod
    def state_bytes(self, name: str, shape: tuple[int, ...]) -> float:
        """Return the bytes of optimiser state of the trained parameter `name` of `shape`."""

    @property
    def steps_in_backward(self) -> bool:
        """Whether `build` returns an `InBackward`."""
        return False


@runtime_checkable
class Skipping(Protocol):
    """A `torch.optim.Optimizer` that leaves out gradients that are not finite."""

    @property
    def skipped(self) -> int:
        """How often a parameter was left as it was because its gradient was not finite; asks the device."""


@runtime_checkable
class InBackward(Protocol):
    """A `torch.optim.Optimizer` that moves every parameter inside the backward pass and frees its gradient.

    No gradient is whole when the loop looks, so it cannot be clipped by its global norm, nor summed over
    processes.
    """

    def announce(self, last: bool, weight: float) -> None:
        """The backward pass of one pack of a step follows.

        Args:
            last: It is the step's last: what was summed up is the step's gradient, and parameters move.
            weight: What the sum so far, this pack included, is to be divided by.
        """

    def gradient_norm(self) -> torch.Tensor:
        """Return the norm of the last step's gradient, as far as it was used (a projected one's)."""
