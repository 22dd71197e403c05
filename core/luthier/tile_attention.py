"""Attention over the tiles of a pack, forward and backward, without ever holding a (T, T) block.

On two CPU cores this is as fast in fp32 as torch's scaled_dot_product_attention and twice as fast in bf16,
needs no copies for grouped heads, and writes every gradient once, where slices under autograd would each cost
a row of zeros. The backward pass computes probabilities again, so memory grows with T, not with its square.
"""

from dataclasses import dataclass
from typing import Any

import torch

from luthier.spans import Tile, TreeSpans


@dataclass(frozen=True)
class Terms:
    """What a layer adds to plain attention: factor, window (in tokens), softcap, dropout probability."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0


def tile_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: TreeSpans, terms: Terms
) -> torch.Tensor:
    """Return the attention of every token of a pack over what its tree lets it see.

    Args:
        query: (H, T, D), any strides.
        key: (G, T, D) with H a multiple of G (grouped heads).
        value: (G, T, E).
        spans: The pack's layout.
        terms: The layer's additions.

    Returns:
        (T, H, E), contiguous, in the dtype of `query`; softmax in float32 at least.
    """
    attended: torch.Tensor = _TileAttention.apply(query, key, value, spans, terms)  # type: ignore[no-untyped-call]
    return attended


class _TileAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: TreeSpans, terms: Terms
    ) -> torch.Tensor:
        heads, tokens, _ = query.shape
        out = query.new_empty(tokens, heads, value.shape[2])
        keeps: list[torch.Tensor | None] = []
        for tile in spans.tiles(terms.window, query.device):
            rows = _rows(query, tile, key.shape[0])
            weights, _ = _weights(rows, _gather(key, tile), tile, terms)
            keep = _keep(weights, terms.dropout)
            keeps.append(keep)
            used = (weights if keep is None else weights * keep).to(value.dtype)
            _put(out, tile, torch.bmm(used, _gather(value, tile)))
        ctx.save_for_backward(query, key, value, out)
        ctx.spans, ctx.terms, ctx.keeps = spans, terms, keeps
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out = ctx.saved_tensors
        groups, tokens, width = key.shape
        grad_query = query.new_empty(tokens, query.shape[0], width)
        # A prompt's keys gather the gradients of all its children: float32 so that none is rounded away.
        grad_key = key.new_zeros(groups, tokens, width, dtype=_wide(key))
        grad_value = value.new_zeros(value.shape, dtype=_wide(value))
        inner = (grad.to(_wide(grad)) * out).sum(-1).T
        for tile, keep in zip(ctx.spans.tiles(ctx.terms.window, query.device), ctx.keeps, strict=True):
            rows, keys, values = _rows(query, tile, groups), _gather(key, tile), _gather(value, tile)
            weights, slope = _weights(rows, keys, tile, ctx.terms)
            above = _rows(grad.transpose(0, 1), tile, groups)
            used = weights if keep is None else weights * keep
            _add(grad_value, tile, torch.bmm(used.to(value.dtype).transpose(1, 2), above))
            scores = torch.bmm(above, values.transpose(1, 2)).to(_wide(above))
            if keep is not None:
                scores *= keep
            scores.sub_(inner[:, tile.rows].reshape(groups, -1, 1)).mul_(weights).mul_(ctx.terms.scale)
            if slope is not None:
                scores *= slope
            low = scores.to(key.dtype)
            _put(grad_query, tile, torch.bmm(low, keys))
            _add(grad_key, tile, torch.bmm(low.transpose(1, 2), rows))
        return grad_query.transpose(0, 1), grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _weights(
    rows: torch.Tensor, keys: torch.Tensor, tile: Tile, terms: Terms
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the probabilities (G, R, K) in float32 and the slope of the softcap where there is one."""
    scores = torch.baddbmm(rows.new_empty(()), rows, keys.transpose(1, 2), beta=0, alpha=terms.scale)
    scores = scores.to(_wide(rows))
    slope = None
    if terms.softcap is not None:
        scores.div_(terms.softcap).tanh_()
        slope = 1 - scores * scores
        scores.mul_(terms.softcap)
    length, width = tile.hidden.shape
    if length > 1 or width > 1:
        square = scores.view(scores.shape[0], -1, length, scores.shape[2])[..., scores.shape[2] - width :]
        square.masked_fill_(tile.hidden, float("-inf"))
    return torch.softmax(scores, dim=-1), slope


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


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
