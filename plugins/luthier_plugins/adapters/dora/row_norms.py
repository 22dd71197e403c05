"""Norms of the rows of a weight with its low-rank update, which is never built."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from luthier import base_of, is_conv1d, linear_shape, product, weight_of

FLOOR = 2e-6
"""Least ‖w + s·b A‖² beside ‖w‖²: what cancels further is lost in fp32 rounding."""
TINY = 1e-12
"""Least ‖w + s·b A‖², so that a row of zeros has a length to divide by."""
BLOCK = 1 << 18
"""Elements of a weight that are looked at together in fp32: they stay in a core's cache."""


@torch.no_grad()
def squared_row_norms(base: nn.Module) -> Tensor:
    """Return ‖w_i‖² of the weight that `base` computes with, in fp32, a block of it at a time.

    Shape: (d_out,); on the meta device it is not computed.
    """
    d_in, d_out = linear_shape(base)
    dense = dense_weight(base)
    total = torch.zeros(d_out, device=weight_of(base).device)
    if total.is_meta:
        return total
    if dense is not None:
        for rows in _blocks(d_out, BLOCK // d_in):
            total[rows] = dense[rows].float().square().sum(1, dtype=torch.float64)
        return total
    # A quantised layer's images of the unit vectors are its columns; each block unpacks the whole weight.
    wide = total.double()
    for columns in _blocks(d_in, 8 * BLOCK // max(d_in, d_out)):
        units = total.new_zeros(columns.stop - columns.start, d_in)
        units.diagonal(columns.start).fill_(1)
        wide += _through(base, units).float().square().sum(0, dtype=torch.float64)
    return wide.float()


@torch.no_grad()
def row_norms(base: nn.Module, squared: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return ‖w_i + s·b_i A‖ from ``‖w_i‖² + 2s·b_i·(A w_i) + s²·b_i (A Aᵀ) b_iᵀ``.

    Args:
        base: The frozen linear layer; the rows of A are passed through it.
        squared: ‖w_i‖², `squared_row_norms` of `base`.
        a: A (r, d_in).
        b: B (d_out, r).
        scale: s.

    Shape: (d_out,), of the dtype of `squared`, above zero; on shapes alone it is not computed.
    """
    if isinstance(squared, FakeTensor) or squared.is_meta:  # shapes without values
        return torch.empty_like(squared)
    with torch.autocast(a.device.type, enabled=False):
        along = _through(base, a).to(b.dtype)  # A Wᵀ (r, d_out)
        terms = torch.addmm(along.T, b, a @ a.T, beta=2 * scale, alpha=scale**2)  # (d_out, r)
        update = (b * terms).sum(1).to(squared.dtype)
    return (squared + update).clamp_(min=FLOOR * squared + TINY).sqrt_()


def dense_weight(base: nn.Module) -> Tensor | None:
    """Return W (d_out, d_in) of a plain layer, None of one whose weight is stored in its own way."""
    if is_conv1d(base):
        return weight_of(base).T
    return weight_of(base) if type(base_of(base)) is nn.Linear else None


def _blocks(length: int, step: int) -> Iterator[slice]:
    """Cut ``range(length)`` into slices of `step`, at least 1, and a rest."""
    step = max(1, step)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


@contextlib.contextmanager
def without_bias(base: nn.Module) -> Iterator[None]:
    """Run `base` without its bias for the block: a large one would take the bits of what is asked for."""
    assert isinstance(base, nn.Linear)
    bias = base.bias
    base.bias = None  # type: ignore[assignment]
    try:
        yield
    finally:
        base.bias = bias


def unbiased(base: nn.Module, x: Tensor) -> Tensor:
    """Return W x, by the layer's own forward where it has one without a bias."""
    if is_conv1d(base):
        return F.linear(x, weight_of(base).T)
    stored = base_of(base)
    with without_bias(stored):
        out: Tensor = stored(x)
    return out


def _through(base: nn.Module, rows: Tensor) -> Tensor:
    """Return ``rows Wᵀ``: in the rows' dtype for a plain base, in that of its own forward otherwise."""
    weight = dense_weight(base)
    if weight is None:
        return unbiased(base, rows)
    if weight.dtype == rows.dtype:
        return product(rows, weight)
    # In half precision a norm would be lost where the update cancels the weight: off by 16 % at 90 %.
    blocks = _blocks(len(weight), BLOCK // weight.shape[1])
    return torch.cat([rows @ weight[block].to(rows.dtype).T for block in blocks], 1)
