"""Tokens that a tokenizer is given, and the rows that the embedding and the output head get for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from luthier.errors import ConfigError, ModelError
from luthier.models.pretrained import quiet


def add_tokens(tokenizer: Any, texts: Sequence[str]) -> tuple[int, ...]:
    """Give `tokenizer` those of `texts` that are no token yet, and return their ids.

    Raises:
        ConfigError: A text is empty.
    """
    from tokenizers import AddedToken

    if blank := [text for text in texts if not text.strip()]:
        raise ConfigError(f"model.new_tokens has {blank[0]!r}, which is blank; expected texts like <think>")
    known = tokenizer.get_vocab()
    added = [text for text in dict.fromkeys(texts) if text not in known]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added])
    return tuple(tokenizer.convert_tokens_to_ids(added))


def fit(model: Any, tokenizer: Any, added: tuple[int, ...], resize: bool) -> tuple[int, ...]:
    """Grow `model` to its tokenizer where that was given tokens or `resize` asks; return the new ids.

    New are the `added` ones, whose rows may be there as the checkpoint's spare ones, and every row made here.
    """
    before = len(model.get_input_embeddings().weight)
    if added or resize:
        grow(model, max(tokenizer.get_vocab().values()) + 1)
    return tuple(sorted({*added, *range(before, len(model.get_input_embeddings().weight))}))


@torch.no_grad()
def grow(model: Any, rows: int) -> None:
    """Give the embedding and the head of `model` at least `rows` rows; new ones are the mean of the old.

    Raises:
        ModelError: They are adapted, quantised or of an unknown kind.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    before = len(embedding.weight)
    if rows <= before:
        return
    plain = isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear | None)
    if not plain or not embedding.weight.is_floating_point():
        raise ModelError(f"the embedding of {before} rows is adapted or quantised and cannot grow to {rows}; "
                         "make one plain model of it first: luthier fold RUN FOLDER")  # fmt: skip
    trains = embedding.weight.requires_grad
    with quiet():
        model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for parameter in () if layer is None else layer.parameters():
            parameter[before:] = parameter[:before].float().mean(0).to(parameter.dtype)
            parameter.requires_grad_(trains)
