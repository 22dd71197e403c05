"""The autograd functions of `luthier.kernels.fused`: frozen parts that keep little for the backward pass.

Those of linear layers return rows, whose shape the caller gives back: a view that a function itself returns
could not be added to in place, as some models do with the output of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.kernels.matmul import product


class FrozenLinear(torch.autograd.Function):
    """y (N, d_out) = x Wᵀ + b with W and b frozen: nothing but W is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return y and keep what the class says."""
        ctx.save_for_backward(weight)
        ctx.shape = x.shape
        out = product(x.reshape(-1, x.shape[-1]), weight)
        if bias is not None:
            out += bias
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of x; nothing else has one."""
        (weight,) = ctx.saved_tensors
        return product(grad, weight.T).view(ctx.shape), None, None


class FrozenGatedMLP(torch.autograd.Function):
    """y (N, d) = (act(x Gᵀ) · x Uᵀ) Dᵀ, frozen: what gate and up give is kept, not act nor their product."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (…, d)
        gate: Tensor,  # G (f, d)
        up: Tensor,  # U (f, d)
        down: Tensor,  # D (d, f)
        act: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Return y and keep what the class says."""
        rows = x.reshape(-1, x.shape[-1])
        g, u = product(rows, gate), product(rows, up)  # (N, f)
        out = product(act(g) * u, down)
        ctx.save_for_backward(g, u, gate, up, down)
        ctx.act, ctx.shape = act, x.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of x; nothing else has one."""
        g, u, gate, up, down = ctx.saved_tensors
        inner = product(grad, down.T)  # (N, f)
        with torch.enable_grad():
            g = g.detach().requires_grad_()
            a = ctx.act(g)
        (grad_g,) = torch.autograd.grad(a, g, inner * u)
        rows = product(grad_g, gate.T)
        del grad_g
        rows += product(inner.mul_(a.detach()), up.T)
        return rows.view(ctx.shape), None, None, None, None


class FrozenNorm(torch.autograd.Function):
    """y = x / rms(x) · w or x / rms(x) · (1 + w), w frozen, y in its dtype: x is kept as it came."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
        """Return y and keep what the class says."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt_()  # as transformers: the same bits
        ctx.save_for_backward(x, weight, rstd)
        ctx.plus_one = plus_one
        # One such family rounds after the weight, the other before it; a stream that is wide is rounded once.
        if plus_one or x.dtype != weight.dtype:
            out: Tensor = (wide * rstd).mul_(weight.to(wide.dtype) + int(plus_one)).to(weight.dtype)
        else:
            out = (wide * rstd).to(weight.dtype) * weight
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of x; nothing else has one."""
        x, weight, rstd = ctx.saved_tensors
        scale = weight.to(rstd.dtype) + int(ctx.plus_one)
        above = grad.to(rstd.dtype) * scale
        unit = x.to(rstd.dtype) * rstd
        inner = torch.linalg.vecdot(above, unit)[..., None] / x.shape[-1]
        return above.sub_(unit.mul_(inner)).mul_(rstd).to(x.dtype), None, None, None
