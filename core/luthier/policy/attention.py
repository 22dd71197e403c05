"""The attention function `luthier_tree`, called by transformers by name, and the switch to it and back.

No mask function is registered beside it: transformers then builds no mask at all, which also saves the device
sync with which it looks for packed sequences. What a model says only in its mask (chunks, for one) does not
reach this function, just as it does not reach flash attention; `Policy.check` finds such models.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from luthier.errors import ModelError
from luthier.kernels import keep_rotations, record_of, turned
from luthier.policy.masked_attention import masked_attention
from luthier.policy.tile_attention import Terms, tile_attention
from luthier.trees import TreeSpans

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "luthier_tree"
MASKED = {"cuda"}
"""The types of devices on which attention runs over a mask; elsewhere over tiles."""
log = logging.getLogger("luthier")
_native: WeakKeyDictionary[PreTrainedModel, dict[str, Any]] = WeakKeyDictionary()


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    tree_spans: TreeSpans | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend along the trees of a pack, as transformers' attention interface asks.

    Args:
        module: The layer's attention module.
        query: (1, H, T, D).
        key: (1, G, T, D).
        value: (1, G, T, E).
        attention_mask: Must be None.
        dropout: Probability, 0 when not training.
        scaling: Factor on the scores; None for one over the square root of D.
        sliding_window: A token sees those less than this many positions before it.
        softcap: Scores are squeezed into this range by tanh.
        tree_spans: The pack's layout, a keyword argument of the model's forward.
        others: What else the model passes; sinks, position biases and other masks are refused.

    Returns:
        (1, T, H, E) and None.

    Raises:
        ModelError: The call is not for a pack, or the model needs more than a tree gives.
    """
    if tree_spans is None:
        raise ModelError(
            f"{type(module).__name__} was called without token trees while attention is '{NAME}'; "
            "run plain forwards and generate() inside policy.native_attention()"
        )
    for name, argument in {**others, "attention_mask": attention_mask}.items():
        if name in ("s_aux", "position_bias", "attention_mask", "cache") and argument is not None:
            raise ModelError(f"{type(module).__name__} needs '{name}', which '{NAME}' does not support")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    terms = Terms(scale, sliding_window, softcap, dropout, wide=record_of(module).wide)
    device = query.device.type
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        query, key, value = query.to(low), key.to(low), value.to(low)
    if device in MASKED:
        if dropout:
            _say_without_dropout(type(module).__name__)
        return masked_attention(query, key, value, tree_spans, terms).transpose(1, 2).contiguous(), None
    rotations = turned(query), turned(key)
    return tile_attention(query[0], key[0], value[0], tree_spans, terms, rotations)[None], None


def use_tree(model: PreTrainedModel) -> None:
    """Switch `model` to tree attention, remembering what it used before."""
    from transformers import AttentionInterface

    if model.config._attn_implementation == NAME:
        return
    AttentionInterface.register(NAME, tree_attention)
    parts = {part: getattr(model.config, part) for part in model.config.sub_configs}
    before = {part: config._attn_implementation for part, config in parts.items() if config is not None}
    _native[model] = {"": model.config._attn_implementation, **before}
    model.set_attn_implementation(NAME)
    keep_rotations(model, model.device.type not in MASKED)


def use_native(model: PreTrainedModel) -> None:
    """Switch `model` back to the attention it had before `use_tree`."""
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation(_native[model])
        keep_rotations(model, False)


@functools.cache
def _say_without_dropout(name: str) -> None:
    log.warning("%s: attention dropout is left out, as no fused kernel with a mask of trees has it", name)
