"""What a merger keeps at random: the same elements whatever is merged before, beside or in which pieces."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch

_HALF = 1 << 31
"""Of the values of 32 bits."""
_ONE = 0x3F800000
"""The bits of 1.0."""


def kept_at_random(shape: torch.Size, share: float, key: tuple[object, ...], start: int) -> torch.Tensor:
    """Return a float32 tensor of `shape` that is 1 with probability `share`, rounded to 2⁻³², and else 0.

    Args:
        shape: Of a run of elements of a tensor.
        share: In [0, 1].
        key: Names the stream, which has a value for every element of the tensor.
        start: Place of the first element in the tensor.
    """
    count = shape.numel()
    below = round(share * 2 * _HALF) - _HALF
    if below >= _HALF:
        return torch.ones(shape)
    seed = hashlib.sha256(json.dumps(key).encode()).digest()
    stream = np.random.PCG64(int.from_bytes(seed, "little"))
    # A draw of 64 bits serves two elements.
    stream.advance(start // 2)
    odd = start % 2
    draws = stream.random_raw((odd + count + 1) // 2).astype("<u8", copy=False).view("<i4")[odd : odd + count]
    kept = torch.from_numpy(draws)
    # Whole numbers until the end: a comparison that yields truth values is several times slower.
    torch.lt(kept, below, out=kept).mul_(_ONE)
    return kept.view(torch.float32).view(shape)
