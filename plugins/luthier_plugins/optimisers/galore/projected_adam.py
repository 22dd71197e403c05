"""AdamW whose moments live in a subspace of each matrix's gradient, and beside it plain AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from luthier_plugins.optimisers.galore.adam_step import adam_step
from luthier_plugins.optimisers.galore.subspace import cold_basis, exact_basis, lift, project, warm_basis


class ProjectedAdam(torch.optim.Optimizer):
    """With P the basis of a matrix's gradient G: R = PᵀG, Adam's direction N̂ of R, ``W ← W − η·s·P N̂``.

    A gradient that is not finite moves nothing: neither its parameter nor the moments, nor the basis.

    State of a parameter, all of it tensors: ``calls``, gradients seen (int64, on the CPU, as it decides what
    is run); ``step``, of those the finite ones; ``exp_avg`` and ``exp_avg_sq``, of R (r, long) where it is
    projected; ``basis`` (short, r). What is drawn at random follows from the parameter's place and ``calls``.

    Args:
        groups: Each has ``params``, ``lr``, ``weight_decay`` and ``rank``: r of its matrices, 0 to leave them
            as they are.
        betas: Decays of the moments.
        eps: Added to the root of the second moment.
        refresh_every: T; basis number i of k is renewed at calls ≡ i·T/k modulo T, so that no step has much
            to do. Each comes into being at the first call.
        scale: s.
        exact: The basis comes from a full singular value decomposition.
        rotate_moments: Moments are taken along into a new basis: with Q = P_newᵀ P_old, M ← Q M and
            V ← (Q∘Q) V.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        refresh_every: int,
        scale: float,
        exact: bool = False,
        rotate_moments: bool = True,
    ) -> None:
        defaults = {
            "lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0, "rank": 0,
            "refresh_every": refresh_every, "scale": scale, "exact": exact, "rotate_moments": rotate_moments,
        }  # fmt: skip
        super().__init__(groups, defaults)
        projected = [p for group in self.param_groups if group["rank"] for p in group["params"]]
        self._places = {p: place for place, p in enumerate(projected)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.move(p, group, self.project(p, group) if group["rank"] else p.grad)

    @property
    def skipped(self) -> int:
        """How often a parameter was left as it was because its gradient was not finite."""
        states = list(self.state.values())
        if not states:
            return 0
        taken = torch.stack([state["step"] for state in states]).sum(dtype=torch.float64)
        return sum(int(state["calls"]) for state in states) - int(taken)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned, in its own dtypes; torch would cast to the parameter's."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, p in zip(saved, own, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                self.state[p][key] = value.to("cpu" if key == "calls" else p.device, copy=True)

    def project(self, p: nn.Parameter, group: dict[str, Any], refresh: bool = True) -> Tensor:
        """Return R (r, long) of p's gradient, in a new basis if it is due; NaN as long as there is none.

        Args:
            p: A projected parameter with a gradient.
            group: Its group.
            refresh: Whether this gradient may give the basis.
        """
        gradient, state = p.grad, self._state(p, group)
        assert gradient is not None
        calls, offset = int(state["calls"]), self._places[p] * group["refresh_every"] // len(self._places)
        due = refresh and calls % group["refresh_every"] == offset
        # Once in T steps the device is asked for a number: a basis of something not finite would be one too.
        if (due or "basis" not in state) and bool(torch.linalg.vector_norm(gradient).isfinite()):
            self._refresh(state, group, gradient, seed=(self._places[p] << 32) + calls)
        if "basis" not in state:
            return p.new_full(state["exp_avg"].shape, torch.nan, dtype=torch.float32)
        return project(state["basis"], gradient)

    def move(self, p: nn.Parameter, group: dict[str, Any], gradient: Tensor) -> Tensor:
        """Move `p` along its gradient, or along R; return the norm of that, 0 if it was not finite."""
        state = self._state(p, group)
        state["calls"] += 1
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        broken = ~norm.isfinite()
        if group["rank"]:
            if group["weight_decay"]:
                p.mul_(1 - group["lr"] * group["weight_decay"] * ~broken)
            direction = torch.zeros_like(gradient)
            adam_step(direction, gradient, state, group, broken, lr=1.0, weight_decay=0.0)  # −N̂
            step = lift(state["basis"], direction, tall=p.shape[0] > p.shape[1]) if "basis" in state else 0.0
            p.add_(step, alpha=group["lr"] * group["scale"])
        else:
            adam_step(p, gradient, state, group, broken, group["lr"], group["weight_decay"])
        return torch.where(broken, 0.0, norm)

    def _state(self, p: nn.Parameter, group: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if not state:
            like = p.new_zeros(group["rank"], max(p.shape), dtype=torch.float32) if group["rank"] else p
            state["calls"] = torch.zeros((), dtype=torch.int64)
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(like, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(like, memory_format=torch.preserve_format)
        return state

    def _refresh(self, state: dict[str, Any], group: dict[str, Any], gradient: Tensor, seed: int) -> None:
        last = state.get("basis")
        if group["exact"]:
            basis = exact_basis(gradient, group["rank"])
        elif last is None:
            basis = cold_basis(gradient, group["rank"], torch.Generator().manual_seed(seed))
        else:
            basis = warm_basis(gradient, last)
        if last is not None and group["rotate_moments"]:
            turn = basis.T @ last  # (r, r)
            state["exp_avg"] = turn @ state["exp_avg"]
            state["exp_avg_sq"] = turn.square() @ state["exp_avg_sq"]
        state["basis"] = basis
