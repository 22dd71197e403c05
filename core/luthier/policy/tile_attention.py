"""Attention over the tiles of a pack, forward and backward, without ever holding a (T, T) block.

On two CPU cores this is as fast in fp32 as torch's scaled_dot_product_attention and twice as fast in bf16,
needs no copies for grouped heads, and writes every gradient once, where slices under autograd would each cost
a row of zeros. The backward pass computes probabilities again, so memory grows with T, not with its square.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from luthier.kernels import Angles, Turned
from luthier.trees import Tile, TreeSpans


@dataclass(frozen=True)
class Terms:
    """What a layer adds to plain attention: factor, window (in tokens), softcap, dropout probability.

    With `wide`, products of queries and keys are float32 whatever those are in: 16 bits round a score of 8 by
    up to 0.03, and a weight by as many parts of itself.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0
    wide: bool = False

    def scored(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Return queries and keys in the dtype that their products are wanted in."""
        return [_widened(x) if self.wide else x for x in inputs]


def tile_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: TreeSpans,
    terms: Terms,
    rotations: tuple[Turned | None, Turned | None] = (None, None),
) -> torch.Tensor:
    """Return the attention of every token of a pack over what its tree lets it see.

    Args:
        query: (H, T, D), any strides.
        key: (G, T, D) with H a multiple of G (grouped heads).
        value: (G, T, E).
        spans: The pack's layout.
        terms: The layer's additions.
        rotations: What made query and key, where known: what they were before is kept and rotated again.

    Returns:
        (T, H, E), contiguous, in the dtype of `query`; softmax in float32 at least.
    """
    inputs, after = [query, key], (query.detach(), key.detach())
    angles: list[Angles | None] = [None, None]
    for place, rotation in enumerate(rotations):
        if rotation is not None:
            inputs[place] = rotation.before[0]
            angles[place] = Angles(rotation.angles.cos[0], rotation.angles.sin[0])
    attended: torch.Tensor = _TileAttention.apply(*inputs, value, spans, terms, after, angles)  # type: ignore[no-untyped-call]
    return attended


class _TileAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        spans: TreeSpans,
        terms: Terms,
        after: tuple[torch.Tensor, torch.Tensor],  # query and key as they take part: rotated
        angles: list[Angles | None],
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        heads, tokens, _ = query.shape
        out = query.new_empty(tokens, heads, value.shape[2])
        query, key = terms.scored(*after)
        keeps: list[torch.Tensor | None] = []
        for tile in spans.tiles(terms.window, query):
            rows = _rows(query, tile, key.shape[0])
            weights, _ = _weights(rows, _gather(key, tile), tile, terms)
            keep = _keep(weights, terms.dropout)
            keeps.append(keep)
            used = (weights if keep is None else weights * keep).to(value.dtype)
            _put(out, tile, torch.bmm(used, _gather(value, tile)))
        ctx.spans, ctx.terms, ctx.keeps, ctx.angles = spans, terms, keeps, angles
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *before, value = ctx.saved_tensors
        query, key = (x if by is None else by.forth(x) for x, by in zip(before, ctx.angles, strict=True))
        terms, (groups, tokens, width) = ctx.terms, key.shape
        scored = terms.scored(query, key)
        grad_query = query.new_empty(tokens, query.shape[0], width)
        # A prompt's keys gather the gradients of all its children: float32 so that none is rounded away.
        grad_key = key.new_zeros(groups, tokens, width, dtype=_wide(key))
        grad_value = value.new_zeros(value.shape, dtype=_wide(value))
        for tile, keep in zip(ctx.spans.tiles(terms.window, scored[0]), ctx.keeps, strict=True):
            rows, keys, values = _rows(query, tile, groups), _gather(key, tile), _gather(value, tile)
            weights, slope = _weights(_rows(scored[0], tile, groups), _gather(scored[1], tile), tile, terms)
            above = _rows(grad.transpose(0, 1), tile, groups)
            used = (weights if keep is None else weights * keep).to(value.dtype)
            _add(grad_value, tile, torch.bmm(used.transpose(1, 2), above))
            scores = torch.bmm(above, values.transpose(1, 2)).to(weights.dtype)
            if keep is not None:
                scores *= keep
            scores = torch._softmax_backward_data(scores, weights, -1, weights.dtype)
            if slope is not None:
                scores *= slope
            scores = scores.to(key.dtype)
            _put(grad_query, tile, _scaled(scores, keys, terms.scale))
            _add(grad_key, tile, _scaled(scores.transpose(1, 2), rows, terms.scale))
        pairs = zip((grad_query.transpose(0, 1), grad_key.to(key.dtype)), ctx.angles, strict=True)
        grads = (x if by is None else by.back(x) for x, by in pairs)
        return *grads, grad_value.to(value.dtype), None, None, None, None


def _weights(
    rows: torch.Tensor, keys: torch.Tensor, tile: Tile, terms: Terms
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the probabilities (G, R, K) in float32 and the slope of the softcap where there is one."""
    scores = _scaled(rows, keys.transpose(1, 2), terms.scale)
    slope = None
    if terms.softcap is not None:
        scores.div_(terms.softcap).tanh_()
        slope = 1 - scores * scores
        scores.mul_(terms.softcap)
    length, width = tile.bias.shape
    if length > 1 or width > 1:
        square = scores.view(scores.shape[0], -1, length, scores.shape[2])[..., scores.shape[2] - width :]
        square.add_(tile.bias)
    return torch.softmax(scores, dim=-1, dtype=_wide(scores)), slope


def _scaled(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """Return ``scale · left @ right`` for batches of matrices."""
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=scale)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _widened(x: torch.Tensor) -> torch.Tensor:
    return x.to(_wide(x))


def _keep(weights: torch.Tensor, dropout: float) -> torch.Tensor | None:
    if not dropout:
        return None
    return torch.rand_like(weights).ge_(dropout).div_(1 - dropout)


def _rows(x: torch.Tensor, tile: Tile, groups: int) -> torch.Tensor:
    """(H, T, D) -> (G, H / G * Q, D): the tile's rows, the heads of one group below each other."""
    return x[:, tile.rows].reshape(groups, -1, x.shape[2])


def _gather(x: torch.Tensor, tile: Tile) -> torch.Tensor:
    parts = [x[:, keys] for keys in tile.keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _put(out: torch.Tensor, tile: Tile, rows: torch.Tensor) -> None:
    """Write (G, H / G * Q, D) to the tile's rows of (T, H, D)."""
    part = out[tile.rows]
    part.copy_(rows.view(part.shape[1], part.shape[0], part.shape[2]).transpose(0, 1))


def _add(total: torch.Tensor, tile: Tile, part: torch.Tensor) -> None:
    start = 0
    for keys in tile.keys:
        length = keys.stop - keys.start
        total[:, keys] += part[:, start : start + length]
        start += length
