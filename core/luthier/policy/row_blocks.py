"""Many rows in blocks, one after the other: how large a block is, and which blocks run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

LOGITS_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
"""Size of a block of fp32 logits by the type of device; other devices are taken for a GPU."""
_simulated: ContextVar[str | None] = ContextVar("_simulated", default=None)


@contextlib.contextmanager
def first_blocks_for(device: str) -> Iterator[None]:
    """Run the first of all blocks alone, as large as suits `device`: it needs the memory that all need."""
    token = _simulated.set(device)
    try:
        yield
    finally:
        _simulated.reset(token)


def logits_rows(vocabulary: int, device: str) -> int:
    """Return how many rows of `vocabulary` fp32 logits are computed together on a device of that type."""
    return max(1, LOGITS_BYTES.get(_simulated.get() or device, LOGITS_BYTES["cuda"]) // (4 * vocabulary))


def blocks_of(count: int, step: int) -> list[slice]:
    """Return slices of `step` rows that cover `count`, the last one smaller."""
    stop = min(step, count) if _simulated.get() else count
    return [slice(start, min(start + step, count)) for start in range(0, stop, step)]
