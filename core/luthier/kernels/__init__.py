"""Faster functions that are equal to what they replace.

Products, norms, activations, rotary, residuals.
"""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier.kernels.fp32_residual import wants_wide as wants_wide, widen as widen
    from luthier.kernels.fused import fuse as fuse, unfused as unfused
    from luthier.kernels.fused_rotary import Angles as Angles, Turned as Turned, turned as turned
    from luthier.kernels.matmul import product as product
    from luthier.kernels.record import (
        is_wide as is_wide,
        keep_rotations as keep_rotations,
        record_of as record_of,
    )
else:
    __getattr__, __dir__, __all__ = attach(__name__)
