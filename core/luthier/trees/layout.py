"""Who sees whom in a pack of token trees: the layout that the attention function reads."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

TILE_ROWS = 128
"""Query rows of a tile: small enough to waste little above the diagonal, large enough for a fast product."""


class Segment(NamedTuple):
    """Consecutive tokens ``start:stop`` of the row that see a parent run whole and themselves causally.

    A prompt and its first child are one segment without a parent: together they are plain causal text.
    """

    start: int
    stop: int
    parent_start: int = 0
    parent_length: int = 0


@dataclass(frozen=True)
class Tile:
    """Some query rows of a segment and the keys that at least one of them sees.

    Attributes:
        rows: The queries' place in the row, Q of them.
        keys: The keys' places, in order of position; K in all.
        bias: (Q, M), for the last M keys: 0 where one is seen, -inf where not; the K - M before them all are.
    """

    rows: slice
    keys: tuple[slice, ...]
    bias: torch.Tensor


@dataclass(frozen=True)
class TreeSpans:
    """The segments of one pack, which cover its T tokens in order.

    What is derived from them (tiles, block masks) is remembered in `cache`: every layer asks for the same.
    """

    segments: tuple[Segment, ...]
    cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def tiles(self, window: int | None, like: torch.Tensor) -> list[Tile]:
        """Return the tiles under a sliding `window` (None: unlimited), with biases for scores `like`."""
        key = ("tiles", window, like.device, like.dtype)
        if key not in self.cache:
            self.cache[key] = [tile for segment in self.segments for tile in _tiles(segment, window, like)]
        tiles: list[Tile] = self.cache[key]
        return tiles

    def table(self, device: torch.device) -> torch.Tensor:
        """Return (4, T) int64: each token's segment, its parent, how much of that it sees, its position.

        Segments are named by the place of their first token; -1 where there is no parent.
        """
        columns = [
            (part.start, part.parent_start if part.parent_length else -1, part.parent_length, place)
            for part in self.segments
            for place in range(part.parent_length, part.parent_length + part.stop - part.start)
        ]
        return torch.tensor(columns, device=device).T.contiguous()


def _tiles(segment: Segment, window: int | None, like: torch.Tensor) -> Iterator[Tile]:
    length, shift = segment.stop - segment.start, segment.parent_length
    step = math.ceil(length / math.ceil(length / TILE_ROWS))
    for first in range(0, length, step):
        last = min(first + step, length)
        oldest = 0 if window is None else max(0, shift + first - window + 1)
        own = slice(segment.start + max(0, oldest - shift), segment.start + last)
        parent = slice(segment.parent_start + min(oldest, shift), segment.parent_start + shift)
        keys = (parent, own) if parent.stop > parent.start else (own,)
        # Without a window only the square on the diagonal hides anything; with one, both edges may.
        newest = shift + last
        unbounded = window is None or newest - oldest <= window
        begin = shift + first if unbounded else oldest
        query = torch.arange(shift + first, newest, device=like.device)[:, None]
        key = torch.arange(begin, newest, device=like.device)
        hidden = key > query
        if not unbounded and window is not None:
            hidden |= query - key >= window
        bias = like.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        yield Tile(slice(segment.start + first, segment.start + last), keys, bias)
