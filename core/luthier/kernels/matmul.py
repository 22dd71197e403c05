"""Matrix products with a weight: through oneDNN where torch's own choice, MKL, is slower.

On AMD processors MKL keeps to 256-bit kernels in fp32, while oneDNN, which torch carries as well and uses for
bf16, has 512-bit ones: on a Zen 5 core 230 against 103 GFLOP/s, both with fp32's own rounding.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor

FEW_ROWS = 32
"""Below this many rows a product is bound by reading the weight, and oneDNN's repacking costs more."""


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """Return ``rows @ weight.T``, not differentiable: for use inside autograd functions.

    Args:
        rows: (N, d_in).
        weight: (d_out, d_in), any strides: the gradient of the rows is ``product(grad, weight.T)``.

    Shape: (N, d_out).
    """
    if rows.dtype == torch.float32 and rows.device.type == "cpu" and len(rows) >= FEW_ROWS and one_dnn_wins():
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
        return out
    return rows @ weight.T


@functools.cache
def one_dnn_wins() -> bool:
    """Whether this processor is one on which oneDNN's fp32 products are the faster ones."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    ):
        return False
    described = Path("/proc/cpuinfo")
    return described.is_file() and "AuthenticAMD" in described.read_text(errors="replace")
