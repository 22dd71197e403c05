"""Attention over a mask, for accelerators: flex_attention's block mask, or a dense one where that is missing.

flex_attention compiles a kernel with Triton, which not every platform has. The dense mask gives the same
values from memory that grows with the square of a pack's tokens.
"""

import functools
import importlib.util
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import flex_attention

from luthier.policy.block_mask import BLOCK, block_mask, visible
from luthier.policy.tile_attention import Terms
from luthier.trees import Segment, TreeSpans


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
    seen = _dense_mask(spans, terms.window, query.device)
    groups = query.shape[1] // key.shape[1]
    if terms.softcap is None:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, seen, scale=terms.scale, enable_gqa=groups > 1
        )
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(2, 3)).float() * terms.scale
    capped = terms.softcap * torch.tanh(scores / terms.softcap)
    return capped.masked_fill(~seen, -torch.inf).softmax(-1).to(value.dtype) @ value


def _dense_mask(spans: TreeSpans, window: int | None, device: torch.device) -> torch.Tensor:
    cached = ("dense", window, device)
    if cached not in spans.cache:
        places = torch.arange(spans.segments[-1].stop, device=device)
        spans.cache[cached] = visible(spans.table(device), window)(None, None, places[:, None], places)
    mask: torch.Tensor = spans.cache[cached]
    return mask


def _flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: TreeSpans, terms: Terms
) -> torch.Tensor:
    tokens = query.shape[2]
    if short := max(0, 2 * BLOCK - tokens):
        # Shorter ones would have kernels of their own; what is added sees itself alone.
        query, key, value = (torch.nn.functional.pad(x, (0, 0, 0, short)) for x in (query, key, value))
    mask = _block_mask(spans, terms.window, short, query.device)
    shape = (*query.shape[1::2], key.shape[1], value.shape[3])
    grads = tuple(x.requires_grad for x in (query, key, value)) if torch.is_grad_enabled() else None
    attend = _compiled(shape, query.dtype, terms, grads)
    attended: torch.Tensor = attend(query, key, value, mask, _cap(terms.softcap), terms.scale)
    return attended[:, :, :tokens]


@functools.cache
def _compiled(
    shape: tuple[int, ...], dtype: torch.dtype, terms: Terms, grads: tuple[bool, ...] | None
) -> Callable[..., Any]:
    """Return what runs heads of one `shape` and `terms`, compiled for packs of any length.

    Of one function's code torch compiles eight graphs; then it runs flex_attention as it is written, with
    whole (H, T, T) scores. It also takes a number that differs between calls for a variable, which soft caps
    must not be. So each kind of layer has code of its own, by a name of its own, and two graphs: for the
    first length, and for all others. ``fullgraph`` makes torch raise where it would give up.
    """
    name = f"attend_{shape}_{dtype}_{terms}_{grads}"
    code = _attend.__code__.replace(co_name=name)
    return torch.compile(types.FunctionType(code, globals(), name), fullgraph=True)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, cap: Any, scale: float
) -> Any:
    grouped = query.shape[1] != key.shape[1]
    return flex_attention(query, key, value, score_mod=cap, block_mask=mask, scale=scale, enable_gqa=grouped)


@functools.cache
def _cap(softcap: float | None) -> Callable[..., torch.Tensor] | None:
    if softcap is None:
        return None

    def cap(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def _block_mask(spans: TreeSpans, window: int | None, short: int, device: torch.device) -> Any:
    cached = ("flex", window, device)
    if cached not in spans.cache:
        end = spans.segments[-1].stop
        added = (Segment(end, end + short),) if short else ()
        spans.cache[cached] = block_mask(TreeSpans((*spans.segments, *added)), window, device)
    return spans.cache[cached]
