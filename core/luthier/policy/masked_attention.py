"""Attention over a mask, for accelerators: flex_attention's block mask, or a dense one where that is missing.

flex_attention compiles a kernel with Triton, which not every platform has. The dense mask gives the same
values from memory that grows with the square of a pack's tokens.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from luthier.policy.tile_attention import Terms
from luthier.trees import TreeSpans


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: TreeSpans, terms: Terms
) -> torch.Tensor:
    """Return the attention of every token of a pack over what its tree lets it see.

    Args:
        query: (1, H, T, D).
        key: (1, G, T, D) with H a multiple of G (grouped heads).
        value: (1, G, T, E).
        spans: The pack's layout.
        terms: The layer's additions, without dropout.

    Returns:
        (1, H, T, E).
    """
    attend = _flex if importlib.util.find_spec("triton") else _dense
    return attend(query, key, value, spans, terms)


def _dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: TreeSpans, terms: Terms
) -> torch.Tensor:
    visible = _dense_mask(spans, terms.window, query.device)
    groups = query.shape[1] // key.shape[1]
    if terms.softcap is None:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, visible, scale=terms.scale, enable_gqa=groups > 1
        )
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(2, 3)).float() * terms.scale
    capped = terms.softcap * torch.tanh(scores / terms.softcap)
    return capped.masked_fill(~visible, -torch.inf).softmax(-1).to(value.dtype) @ value


def _dense_mask(spans: TreeSpans, window: int | None, device: torch.device) -> torch.Tensor:
    cached = ("dense", window, device)
    if cached not in spans.cache:
        places = torch.arange(spans.segments[-1].stop, device=device)
        spans.cache[cached] = _visible(spans.table(device), window)(None, None, places[:, None], places)
    mask: torch.Tensor = spans.cache[cached]
    return mask


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


@functools.cache
def _cap(softcap: float) -> Callable[..., torch.Tensor]:
    # One function object a value, so that the compiled kernel is found again.
    def cap(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def _flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: TreeSpans, terms: Terms
) -> torch.Tensor:
    cap = None if terms.softcap is None else _cap(terms.softcap)
    mask = _block_mask(spans, terms.window, query.device)
    attended: torch.Tensor = _compiled()(
        query,
        key,
        value,
        score_mod=cap,
        block_mask=mask,
        scale=terms.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended


def _block_mask(spans: TreeSpans, window: int | None, device: torch.device) -> Any:
    cached = ("flex", window, device)
    if cached not in spans.cache:
        visible = _visible(spans.table(device), window)
        tokens = spans.segments[-1].stop
        spans.cache[cached] = create_block_mask(visible, None, None, tokens, tokens, device=str(device))
    return spans.cache[cached]


def _visible(table: torch.Tensor, window: int | None) -> Callable[..., Any]:
    """Return flex attention's mask function: whether token q sees token k."""
    segment, parent, prompt, place = table

    def visible(batch: Any, head: Any, q: torch.Tensor, k: torch.Tensor) -> Any:
        own = (segment[q] == segment[k]) & (q >= k)
        seen = own | ((parent[q] == segment[k]) & (place[k] < prompt[q]))
        return seen if window is None else seen & (place[q] - place[k] < window)

    return visible
