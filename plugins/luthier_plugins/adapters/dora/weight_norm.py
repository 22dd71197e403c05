"""A linear layer whose weight rows, low-rank update included, have lengths of their own to learn.

``y = c ⊙ (W x + s·B A x) + bias`` with ``c = m / ‖W + s·B A‖`` for every output row, the norm a constant in
the backward pass (DoRA: Liu et al. 2024, arXiv 2402.09353, equations 5 and 11). ``W + s·B A`` is never built.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luthier import ModelError, product
from luthier_plugins.adapters.dora.row_norms import dense_weight, unbiased
from luthier_toolkits.low_rank import compute_dtype


def weight_normed_linear(
    base: nn.Module,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    norms: Tensor,
    scale: float,
    dropped: Tensor | None = None,
) -> Tensor:
    """Return ``c ⊙ (W x + s·B A dropped) + bias`` with ``c = magnitude / norms``.

    Args:
        base: The linear layer, frozen; quantised ones run their own forward.
        x: (…, d_in).
        a: A (r, d_in), any floating dtype.
        b: B (d_out, r).
        magnitude: m (d_out,).
        norms: ‖W + s·B A‖ (d_out,), a constant.
        scale: s.
        dropped: What A sees of x, (…, d_in); None for x itself.

    Shape: (…, d_out), in the dtype `base` computes in.
    """
    weight: Tensor | None = dense_weight(base)
    z, bias = None, base.bias
    assert bias is None or isinstance(bias, Tensor)
    if weight is None or weight.requires_grad or dropped is not None:
        z, weight = unbiased(base, x), None
    low = x if dropped is None else dropped
    rows: Tensor = _WeightNormed.apply(low, a, b, magnitude, norms, scale, weight, bias, z)  # type: ignore[no-untyped-call]
    return rows.view(*x.shape[:-1], -1)


class _WeightNormed(torch.autograd.Function):
    """y = c ⊙ (W x + s·B u) + bias, u = A x, c = m / norm.

    With g = ∂L/∂y and h = s·(g ⊙ c) B: ∂x = (g ⊙ c) W + h A, ∂A = hᵀ x, ∂B = s·c ⊙ (gᵀ u) and, from the
    output itself, ∂m = Σ g ⊙ (y − bias) / m: x, u and y are all that is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (…, d_in)
        a: Tensor,  # (r, d_in)
        b: Tensor,  # (d_out, r)
        magnitude: Tensor,  # (d_out,)
        norms: Tensor,  # (d_out,)
        scale: float,
        weight: Tensor | None,  # (d_out, d_in), or None where W x comes from elsewhere: `z`
        bias: Tensor | None,
        z: Tensor | None,  # (…, d_out)
    ) -> Tensor:
        dtype = compute_dtype(x) if z is None else z.dtype
        c = magnitude / norms
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)  # (N, d_in)
            u = rows @ a.to(dtype).T  # (N, r)
            if z is None:
                assert weight is not None
                y = product(rows, weight.to(dtype)).addmm_(u, b.to(dtype).T, alpha=scale)
            else:
                y = torch.addmm(z.reshape(-1, z.shape[-1]), u, b.to(dtype).T, alpha=scale)
            _multiply(y, c, y)
            out = y if bias is None else y + bias.to(dtype)
        needs_a, needs_b, needs_m = ctx.needs_input_grad[1:4]
        kept = rows if needs_a else None, u if needs_b else None, y if needs_m else None
        ctx.save_for_backward(*kept, a, b, magnitude, c, weight)
        ctx.scale, ctx.x_dtype, ctx.x_shape = scale, x.dtype, x.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # (N, d_out)
        rows, u, y, a, b, magnitude, c, weight = _kept(ctx)
        needs_x, needs_z = ctx.needs_input_grad[0], ctx.needs_input_grad[8]
        grad_x = grad_z = grad_a = grad_b = grad_m = None
        with torch.autocast(g.device.type, enabled=False):
            if y is not None:
                share = torch.where(magnitude == 0, 0, 1 / magnitude)
                grad_m = (_inner(g, y) * share).to(magnitude.dtype)
            scaled = ctx.scale * c[:, None] * b  # s·c ⊙ B (d_out, r)
            h = g @ scaled.to(g.dtype)  # (N, r)
            if rows is not None:
                grad_a = (h.T @ rows).to(a.dtype)
            if u is not None:
                grad_b = ((g.T @ u).to(b.dtype) * (ctx.scale * c[:, None])).to(b.dtype)
            # The lowest adapted layer's input needs no gradient, and nothing below it is visited.
            if needs_x and weight is not None:
                inner = _multiply(g, c, torch.empty_like(g))
                grad_x = product(inner, weight.to(g.dtype).T).addmm_(h, a.to(g.dtype))
            elif needs_x:
                grad_x = h @ a.to(g.dtype)
            if needs_z:
                grad_z = _multiply(g, c, torch.empty_like(g)).view(*ctx.x_shape[:-1], -1)
        grad_x = None if grad_x is None else grad_x.view(ctx.x_shape).to(ctx.x_dtype)
        return grad_x, grad_a, grad_b, grad_m, None, None, None, None, grad_z


def _kept(ctx: Any) -> tuple[Tensor, ...]:
    try:
        kept: tuple[Tensor, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise ModelError(
            "the model adds in place to the output of a layer, which DoRA keeps for the backward pass, as "
            "Falcon's does to that of its MLP: leave such layers out of adapter.targets, or take adapter=lora"
        ) from error
    return kept


def _multiply(rows: Tensor, c: Tensor, out: Tensor) -> Tensor:
    """Write ``rows ⊙ c`` to `out` (N, d_out), rounded once.

    In half precision c itself would be off by 0.4 %, its distance from 1 by as little of that. On the CPU a
    product of two dtypes would make copies of both in fp32.
    """
    if rows.dtype == c.dtype or rows.device.type != "cpu":
        return torch.mul(rows, c, out=out)
    return torch.addcmul(rows, rows, (c - 1).to(rows.dtype), out=out)


def _inner(g: Tensor, y: Tensor) -> Tensor:
    """Return ``Σ_n g_n ⊙ y_n`` (d_out,), summed in fp32 at least."""
    return (g * y).sum(0, dtype=torch.promote_types(g.dtype, torch.float32))
