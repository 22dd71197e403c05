"""A linear layer plus a low-rank update as one autograd function that remembers next to nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luthier.kernels import product


def low_rank_linear(base: nn.Module, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return ``base(x) + scale · (x aᵀ) bᵀ``, in the dtype `base` computes in.

    Of its activations only x and u = x aᵀ are kept for the backward pass; the update is added in place to
    what a plain frozen `nn.Linear` gives, in both directions.

    Args:
        base: The linear layer, frozen; quantised ones run their own forward.
        x: (…, d_in).
        a: (r, d_in), any floating dtype.
        b: (d_out, r).
        scale: s.

    Shape: (…, d_out).
    """
    if type(base) is nn.Linear and not base.weight.requires_grad:
        rows: Tensor = _LowRank.apply(x, a, b, scale, base.weight, base.bias, None)  # type: ignore[no-untyped-call]
    else:
        rows = _LowRank.apply(x, a, b, scale, None, None, base(x))  # type: ignore[no-untyped-call]
    # Outside of the function: a view that it returned itself could not be added to in place, as models do.
    return rows.view(*x.shape[:-1], -1)


def principal_part(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return (d_out, r) and (r, d_in) whose product is the best rank-r approximation of `weight`, nearly.

    Both carry the root of the singular values, which eight randomised power iterations find; `generator`
    (on the CPU) decides their start.
    """
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        u, s, v = torch.svd_lowrank(weight, q=min(rank + 16, *weight.shape), niter=8)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:, :rank].T


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return what autocast, where it is on, computes the product of x in, else the dtype of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _LowRank(torch.autograd.Function):
    """y = W x + bias + s·b(a x). With g = ∂L/∂y and h = s·bᵀg: ∂x = Wᵀg + aᵀh, ∂a = h xᵀ, ∂b = s·g uᵀ."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (…, d_in)
        a: Tensor,  # (r, d_in)
        b: Tensor,  # (d_out, r)
        scale: float,
        weight: Tensor | None,  # (d_out, d_in), or None where `y` comes from elsewhere
        bias: Tensor | None,
        y: Tensor | None,  # (…, d_out)
    ) -> Tensor:
        dtype = compute_dtype(x) if y is None else y.dtype
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)  # (N, d_in)
            u = rows @ a.to(dtype).T  # (N, r)
            if y is None:
                assert weight is not None
                out = product(rows, weight.to(dtype))
                if bias is not None:
                    out += bias.to(dtype)
                out.addmm_(u, b.to(dtype).T, alpha=scale)
            else:
                out = torch.addmm(y.reshape(-1, y.shape[-1]), u, b.to(dtype).T, alpha=scale)
        needs_a, needs_b = ctx.needs_input_grad[1:3]
        ctx.save_for_backward(rows if needs_a else None, u if needs_b else None, a, b, weight)
        ctx.scale, ctx.x_dtype, ctx.x_shape = scale, x.dtype, x.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # (N, d_out)
        rows, u, a, b, weight = ctx.saved_tensors
        grad_x = grad_a = grad_b = None
        with torch.autocast(g.device.type, enabled=False):
            h = (g @ b.to(g.dtype)).mul_(ctx.scale)  # (N, r)
            if rows is not None:
                grad_a = (h.T @ rows).to(a.dtype)
            if u is not None:
                grad_b = (g.T @ (u * ctx.scale)).to(b.dtype)
            # The lowest adapted layer's input needs no gradient, and nothing below it is visited.
            if ctx.needs_input_grad[0]:
                grad_x = h @ a.to(g.dtype) if weight is None else product(g, weight.to(g.dtype).T)
                if weight is not None:
                    grad_x.addmm_(h, a.to(g.dtype))
                grad_x = grad_x.view(ctx.x_shape).to(ctx.x_dtype)
        grad_y = g.view(*ctx.x_shape[:-1], -1) if ctx.needs_input_grad[6] else None
        return grad_x, grad_a, grad_b, None, None, None, grad_y
