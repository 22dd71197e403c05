"""The subspace that holds most of a matrix's energy, and what it means to live in it.

A basis (short, r) spans it on the side of the matrix that is shorter: for G (m, n) with m ≤ n its columns are
left singular vectors U_r, else right ones V_r. Inside, everything lies on its side: R = PᵀG or (G P)ᵀ is
(r, long) for both, so that nothing else needs to know which side it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luthier import pick_dtype, product

SHIFTS = (0.0, 0.5, 0.2)
"""An iteration multiplies by GGᵀ − c·λ, λ the least energy of a column so far: c for each, in turn.

The polynomial x (x − λ/2) (x − λ/5) is flatter below λ than x³ is, so what does not belong fades faster: on
gradients of SmolLM2 the loss of energy halves.
"""
TINY = 1e-7
"""What stays of a direction in which the matrix has no energy: enough for it to be kept."""


def exact_basis(matrix: Tensor, rank: int) -> Tensor:
    """Return the `rank` leading singular vectors of `matrix` (m, n) on its shorter side, in order.

    Where LAPACK's decomposition does not converge, what `cold_basis` finds.

    Shape: (min(m, n), rank), fp32.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    try:
        u, _, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return cold_basis(matrix, rank, torch.Generator().manual_seed(0))
    vectors: Tensor = vh[:rank].T if tall else u[:, :rank]
    return vectors.contiguous()


def cold_basis(matrix: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Return nearly the span of the `rank` leading singular vectors, from a random start.

    Halko, Martinsson and Tropp 2011, algorithm 4.4, with shifts.

    Args:
        matrix: (m, n), finite.
        rank: At most min(m, n).
        generator: On the CPU, so that the start is the same on every device.

    Shape: (min(m, n), rank), fp32.
    """
    start = torch.randn(min(matrix.shape), rank, generator=generator)
    return warm_basis(matrix, start.to(matrix.device))


def warm_basis(matrix: Tensor, last: Tensor) -> Tensor:
    """Return nearly the span of the leading singular vectors, from the basis `last` of an earlier matrix.

    Three shifted subspace iterations, in bf16 where the device computes in it natively (the rounding is far
    below what three iterations leave), orthonormalised in fp32 by Householder's QR. Directions in which the
    matrix has no energy are kept, and so are signs.

    Shape: (min(m, n), r), fp32, as `last`.
    """
    short = _short_first(matrix)
    norm = torch.linalg.vector_norm(short, dtype=torch.float32).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = (short / norm).to(pick_dtype("auto", matrix.device))  # (short, long)
    basis = last
    # The first iteration only looks for the way: half of the matrix will do, unless that is few columns.
    half = scaled[:, : max(scaled.shape[1] // 2, 2 * last.shape[1])]
    for part, shift in zip((half, scaled, scaled), SHIFTS, strict=True):
        low = product(basis.T.to(part.dtype), part.T)  # (r, long)
        image = product(low, part).float().T  # (short, r), by columns, as LAPACK wants them
        energy = torch.linalg.vector_norm(low, dim=1, dtype=torch.float32).min().square()
        basis = torch.linalg.qr(image.sub_(basis * (shift * energy - TINY))).Q
    # A basis that has not moved keeps its signs, and is laid out as a checkpoint brings it back: products of
    # other strides round otherwise.
    signed: Tensor = basis * torch.where((basis * last).sum(0) < 0, -1.0, 1.0)
    return signed.contiguous()


def project(basis: Tensor, matrix: Tensor) -> Tensor:
    """Return R = PᵀG, or (G P)ᵀ of a tall G.

    Args:
        basis: P, (short, r).
        matrix: G, (m, n).

    Shape: (r, max(m, n)), fp32.
    """
    return product(basis.T, _short_first(matrix.float()).T)


def lift(basis: Tensor, low: Tensor, tall: bool) -> Tensor:
    """Return P N, or Nᵀ Pᵀ for a `tall` matrix: the step (m, n) that N (r, long) stands for."""
    return product(low.T, basis) if tall else product(basis, low.T)


def _short_first(matrix: Tensor) -> Tensor:
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
