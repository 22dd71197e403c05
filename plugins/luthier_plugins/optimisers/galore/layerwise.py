"""A `ProjectedAdam` that moves every parameter inside the backward pass and frees its gradient at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from luthier_plugins.optimisers.galore.projected_adam import ProjectedAdam


class ProjectedAdamInBackward(ProjectedAdam):
    """`ProjectedAdam` as a `luthier.InBackward`: a gradient is gone before the next is there.

    Of each pack a projected matrix's gradient is projected and freed; the step's sum is one of R (r, long).
    A basis that is due comes from the step's first pack. The others keep their gradients until the last pack.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        """Take `ProjectedAdam`'s arguments, and hook on to every parameter."""
        super().__init__(*args, **options)
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._norms: list[Tensor] = []
        self._norm = torch.zeros(())
        self.announce(last=False, weight=1.0)
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(functools.partial(self._arrived, number))

    def announce(self, last: bool, weight: float) -> None:
        """See `luthier.contracts.optimiser.InBackward`."""
        self._last, self._weight = last, weight

    def gradient_norm(self) -> Tensor:
        """Return the norm of the last step's gradient, of R where it is projected; what was skipped is 0."""
        return self._norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """End the step: what the last pack gave no gradient, but an earlier one did, moves now."""
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is not None and group["rank"]:
                    self._collect(p, group)  # put there by hand
                if p.grad is not None or p in self._sums:
                    self._finish(number, p)
        if self._norms:
            self._norm = torch.linalg.vector_norm(torch.stack(self._norms))
            self._norms.clear()
        self.announce(last=False, weight=1.0)

    @torch.no_grad()
    def _arrived(self, number: int, p: nn.Parameter) -> None:
        # By number, as loading a state replaces the groups.
        if self.param_groups[number]["rank"]:
            self._collect(p, self.param_groups[number])
        if self._last:
            self._finish(number, p)

    def _collect(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        low = self.project(p, group, refresh=p not in self._sums)
        p.grad = None
        self._sums[p] = self._sums[p].add_(low) if p in self._sums else low

    def _finish(self, number: int, p: nn.Parameter) -> None:
        gradient = self._sums.pop(p, p.grad)
        assert gradient is not None
        self._norms.append(self.move(p, self.param_groups[number], gradient.mul_(1.0 / self._weight)))
        p.grad = None
