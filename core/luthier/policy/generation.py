"""Answers to prompts: greedy or sampled, prompts of like length together."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from luthier.contracts import Row
from luthier.errors import DataError
from luthier.models import answer_ends
from luthier.policy.model_policy import ModelPolicy
from luthier.text import Codec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Decoding:
    """How answers are made.

    Attributes:
        max_new_tokens: Tokens an answer may have.
        batch_size: Answers made at a time.
        n: Answers to each prompt.
        temperature: Of sampling; None for the likeliest token each time.
        top_p: Share of the probability that sampling keeps.
    """

    max_new_tokens: int
    batch_size: int
    n: int = 1
    temperature: float | None = None
    top_p: float = 1.0


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        text: Without special tokens, as it continues its prompt.
        finished: It came to an end by itself.
        ids: Its tokens, the end among them.
    """

    text: str
    finished: bool
    ids: tuple[int, ...] = ()

    @property
    def said(self) -> str:
        """The text without the white space around it."""
        return self.text.strip()

    def after(self, prompt: Any) -> str:
        """Return what follows `prompt`: after a text as it is, after messages what the message says."""
        return self.text if isinstance(prompt, str) else self.said


def answers(
    policy: ModelPolicy, codec: Codec, prompts: Sequence[Sequence[int]], decoding: Decoding
) -> Iterator[tuple[int, list[Answer]]]:
    """Yield the place of every prompt and its answers, the shortest prompts first."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for ids in prompts:
        check_known(codec.tokenizer, ids, len(policy.model.get_input_embeddings().weight), "a prompt")
    together = max(1, decoding.batch_size // decoding.n)
    ends = frozenset(answer_ends(policy.model.generation_config, codec))
    policy.model.eval()
    for first in range(0, len(order), together):
        places = order[first : first + together]
        rows = _continued(policy, codec, [list(prompts[i]) for i in places], decoding, ends)
        for turn, place in enumerate(places):
            own = rows[turn * decoding.n : (turn + 1) * decoding.n]
            yield place, [_answer(codec, ids, ends) for ids in own]


def _answer(codec: Codec, ids: list[int], ends: frozenset[int]) -> Answer:
    """Return the answer that generated `ids` are, up to their first end; behind it stands padding."""
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    said, own = ids[:end], ids if end is None else ids[: end + 1]
    return Answer(codec.text(said), end is not None, tuple(own))


@torch.no_grad()
def _continued(
    policy: ModelPolicy, codec: Codec, prompts: list[list[int]], decoding: Decoding, ends: frozenset[int]
) -> list[list[int]]:
    """Return `n` continuations of each prompt; prompts are padded on the left."""
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    pad = codec.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=policy.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=policy.device)
    sampled = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    own = policy.model.generation_config
    # Penalties, beams and forced tokens that came with a checkpoint are none of ours.
    policy.model.generation_config = GenerationConfig(eos_token_id=sorted(ends), pad_token_id=pad)
    try:
        with policy.native_attention(), policy.autocast():
            started = _started(policy.model, ids, mask, decoding.n)
            out = policy.model.generate(
                input_ids=ids.repeat_interleave(decoding.n, 0),
                attention_mask=mask.repeat_interleave(decoding.n, 0),
                max_new_tokens=_room(policy, width, decoding.max_new_tokens),
                # Processes answer different numbers of prompts, and none needs another for it.
                synced_gpus=False,
                **(sampled if decoding.temperature is not None else {"do_sample": False}),
                **started,
            )
    finally:
        policy.model.generation_config = own
    rows: list[list[int]] = out[:, width:].tolist()
    return rows


def _started(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, n: int) -> dict[str, Any]:
    """Run the prompts `ids` (B, L) but for their last tokens, once each, and return the cache of n answers.

    A model whose state is no cache of keys and values, or that takes no positions, starts from nothing.
    `generate` alone asks the head for a slice of hidden states, which copies its weight for each prompt.
    """
    decoder = model.get_decoder()  # without the head, which nothing asks here
    takes = inspect.signature(decoder.forward).parameters
    cached = model._supports_default_dynamic_cache() and not model._is_stateful
    if ids.shape[1] < 2 or not cached or not {"position_ids", "past_key_values"} <= takes.keys():
        return {}
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))  # as `generate` makes it
    places = (mask.cumsum(-1) - 1).clamp_(min=0)
    decoder(
        input_ids=ids[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=places[:, :-1],
        past_key_values=cache,
        use_cache=True,
    )
    cache.batch_repeat_interleave(n)
    return {"past_key_values": cache}


def _room(policy: ModelPolicy, width: int, max_new_tokens: int) -> int:
    """Return how many tokens may follow `width` ones: learned positions end with the context."""
    context = policy.model.config.get_text_config().to_dict().get("max_position_embeddings")
    return max_new_tokens if context is None else max(1, min(max_new_tokens, context - width))


def check_room(prompts: Sequence[Sequence[int]], rows: Sequence[Row], context: int | None) -> None:
    """Refuse a prompt that leaves no token of `context` for an answer.

    Raises:
        DataError: The first such row is named.
    """
    for ids, row in zip(prompts, rows, strict=True):
        if context is not None and len(ids) >= context:
            raise DataError(
                f"{row.origin}: the prompt has {len(ids):,} tokens, and the model's context is {context:,}: "
                "there is no room for an answer; shorten it or leave the row out"
            )


def check_known(tokenizer: Any, ids: Sequence[int], size: int | None, origin: str) -> None:
    """Refuse a token that the model's embedding of `size` rows has none for; None: that is not known.

    Raises:
        DataError: There is one.
    """
    if size is not None and (beyond := next((token for token in ids if token >= size), None)) is not None:
        name = tokenizer.convert_ids_to_tokens(beyond)
        raise DataError(
            f"{origin}: the token {name!r} is number {beyond:,}, and the model's embedding has {size:,} "
            "rows; set model.resize=true, which adds some, or take the tokenizer that the model came with"
        )
