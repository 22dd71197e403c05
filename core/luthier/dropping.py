"""What a merger keeps at random: the same elements whatever is merged before, beside or in which pieces."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch

_VALUES = 1 << 32


def kept_at_random(shape: torch.Size, share: float, key: tuple[object, ...], start: int) -> torch.Tensor:
    """Return a bool tensor of `shape` that is true with probability `share`, rounded to 2⁻³².

    Args:
        shape: Of a run of elements of a tensor.
        share: In [0, 1].
        key: Names the stream, which has a value for every element of the tensor.
        start: Place of the first element in the tensor.
    """
    count = shape.numel()
    seed = hashlib.sha256(json.dumps(key).encode()).digest()
    stream = np.random.PCG64(int.from_bytes(seed, "little"))
    # A draw of 64 bits serves two elements.
    stream.advance(start // 2)
    odd = start % 2
    draws = stream.random_raw((odd + count + 1) // 2).astype("<u8", copy=False).view("<u4")[odd : odd + count]
    return torch.from_numpy(draws < share * _VALUES).view(shape)
