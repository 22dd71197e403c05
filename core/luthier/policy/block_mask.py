"""Flex attention's block mask of a pack, worked out from its segments in O((T/128)²).

torch's own `create_block_mask` evaluates every pair of tokens: 4 T² bytes, 11 T² with a window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from luthier.trees import TreeSpans

BLOCK = 128
"""Queries, and keys, of a block: flex attention's own default."""


def block_mask(spans: TreeSpans, window: int | None, device: torch.device) -> BlockMask:
    """Return the mask of a pack of T tokens under a sliding `window` (None: unlimited), on `device`."""
    some, every = _blocks(torch.tensor(spans.segments), window)
    (count, keys), (full_count, full_keys) = _ordered(some & ~every), _ordered(every)
    return BlockMask.from_kv_blocks(
        count.to(device),
        keys.to(device),
        full_count.to(device),
        full_keys.to(device),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible(spans.table(device), window),
        seq_lengths=(spans.segments[-1].stop,) * 2,
    )


def visible(table: Tensor, window: int | None) -> Callable[..., Any]:
    """Return flex attention's mask function: whether token q sees token k."""
    segment, parent, prompt, place = table

    def sees(batch: Any, head: Any, q: Tensor, k: Tensor) -> Any:
        own = (segment[q] == segment[k]) & (q >= k)
        seen = own | ((parent[q] == segment[k]) & (place[k] < prompt[q]))
        return seen if window is None else seen & (place[q] - place[k] < window)

    return sees


def _blocks(segments: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Return (Q, K) bool each: of which blocks of keys the queries of a block see some, and see every one.

    Rows of one segment in one block see two runs of keys, of their own segment and of its parent: what any of
    them sees, and what all of them see, follows from the first and the last row alone.
    """
    # (P,) each, P pieces of segments (S, 4) that lie in one block of queries.
    starts, stops = segments[:, 0], segments[:, 1]
    pieces = (stops - 1) // BLOCK - starts // BLOCK + 1
    start, stop, parent, length = segments.repeat_interleave(pieces, 0).T
    block = torch.arange(len(start)) - (pieces.cumsum(0) - pieces - starts // BLOCK).repeat_interleave(pieces)
    first, end = torch.maximum(start, block * BLOCK), torch.minimum(stop, (block + 1) * BLOCK)
    reach = int(stops[-1]) if window is None else window
    edges = torch.arange(0, int(stops[-1]), BLOCK)

    def shared(oldest: Tensor, newest: Tensor) -> Tensor:
        """Return (P, K), how many keys from `oldest` and before `newest` lie in each block."""
        low, high = torch.maximum(oldest[:, None], edges), torch.minimum(newest[:, None], edges + BLOCK)
        return (high - low).clamp_(min=0)

    def keys(row: Tensor, newest: Tensor) -> Tensor:
        """Return (P, K), how many keys lie in each block, from what `row` sees first and before `newest`."""
        oldest = row - reach + 1
        inherited = (length + oldest - start).clamp(min=0)
        return shared(torch.maximum(start, oldest), newest) + shared(parent + inherited, parent + length)

    zeros = torch.zeros(len(edges), len(edges), dtype=torch.int64)
    some = zeros.index_add(0, block, (keys(first, end) > 0).long())
    every = zeros.index_add(0, block, (keys(end - 1, first + 1) == BLOCK) * (end - first)[:, None])
    return some > 0, every == BLOCK


def _ordered(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks of keys each block of queries has, (1, 1, Q), and those first, (1, 1, Q, K)."""
    order = mask.int().argsort(stable=True, dim=-1, descending=True)
    return mask.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]
