"""The score head that an objective asks for: a new one, or the one that the model carries."""

from __future__ import annotations

import logging

import torch

from luthier.contracts import Objective
from luthier.errors import ConfigError, ModelError
from luthier.models import TASKS, LoadedModel, attach_head, head_name, head_of, saved_kind

log = logging.getLogger("luthier")


def give_head(loaded: LoadedModel, objective: Objective, name: str, seed: int) -> None:
    """Make sure that `loaded` has the head that `objective`, called `name`, trains, in place.

    Raises:
        ModelError: It carries a head of another kind, or transformers has no class for the result.
        ConfigError: The tokenizer has no token to pad with that could not be the end of a text.
    """
    check_head(loaded, objective, name, needed=False)
    head = head_of(loaded.model)
    if objective.head is None:
        if head is not None:
            log.warning("%s has a score head, which objective=%s leaves out", loaded.name, name)
            del loaded.model.score_head
        return
    if objective.head in TASKS:
        head_name(loaded.model, objective.head)  # before training rather than when it is saved
    if objective.head == "sequence":
        _pad_apart(loaded)
    if head is None:
        attach_head(loaded.model, objective.head, torch.Generator().manual_seed(seed))
    else:
        log.info("the score head of %s goes on training", loaded.name)
        head.requires_grad_(True)


def check_head(loaded: LoadedModel, objective: Objective, name: str, needed: bool = True) -> None:
    """Refuse a model whose head is not the one that `objective`, called `name`, asks for.

    Raises:
        ModelError: It has another one, or, where one is `needed`, none.
    """
    head = head_of(loaded.model)
    if objective.head is None:
        check_speaks(loaded)
    elif head is None and needed:
        raise ModelError(f"objective={name} measures a reward model, and {loaded.name} has no score head")
    elif head is not None and head.kind != objective.head:
        raise ModelError(
            f"objective={name} needs a head of the kind {objective.head}, and that of {loaded.name} is of "
            f"the kind {head.kind}"
        )


def check_speaks(loaded: LoadedModel) -> None:
    """Refuse a reward model without the output head of a language model, whose weights would be drawn.

    Raises:
        ModelError: It is one.
    """
    config = loaded.model.config
    if saved_kind(config.architectures) and not config.get_text_config().tie_word_embeddings:
        raise ModelError(
            f"{loaded.name} is a reward model and has no output head of a language model: it scores, and "
            "can neither answer nor learn to; expected the model that it was trained from"
        )


def _pad_apart(loaded: LoadedModel) -> None:
    """Let the pad token be another than the end: transformers' class scores the last token that is no pad."""
    tokenizer = loaded.tokenizer
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    special = [tokenizer.unk_token, tokenizer.bos_token, *tokenizer.all_special_tokens]
    apart = next((token for token in special if token and token != tokenizer.eos_token), None)
    if apart is None:
        raise ConfigError(
            f"{loaded.name}: its only special token ends a text and pads one; transformers would score the "
            "token before the end. Add a pad token to its tokenizer"
        )
    tokenizer.pad_token = apart
    loaded.model.config.pad_token_id = loaded.model.generation_config.pad_token_id = tokenizer.pad_token_id
