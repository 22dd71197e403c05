"""Rows of pairs: from prompt, chosen and rejected, in every layout they come in, to one tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from luthier.codec import Codec, Prompt
from luthier.data_source import Row
from luthier.errors import DataError, UnusableRowError
from luthier.messages import Message, is_empty
from luthier.tree import Tree

SIDES = ("chosen", "rejected")


def pair_tree(row: Row, codec: Codec) -> Tree:
    """Return the tree of a row: its prompt with the chosen and the rejected completion.

    Raises:
        UnusableRowError: A side is empty.
        DataError: A column is missing, or the sides do not share a prompt; the message names the row.
    """
    prompt, sides = split_pair(row)
    for name, side in zip(SIDES, sides, strict=True):
        if not side or (not side.strip() if isinstance(side, str) else all(map(is_empty, side))):
            raise UnusableRowError(row.origin, f"with an empty side: '{name}'")
    tools = row.fields.get("tools")
    chosen, rejected = (codec.pair(prompt, side, row.origin, tools=tools) for side in sides)
    if chosen.prompt != rejected.prompt:
        raise DataError(
            f"{row.origin}: the chat template renders the prompt differently before chosen and before "
            "rejected; take another with model.chat_template"
        )
    return replace(chosen, branches=chosen.branches + rejected.branches)


def split_pair(row: Row) -> tuple[Prompt, tuple[Prompt, Prompt]]:
    """Return the prompt and the two completions of a row, each text or messages.

    Raises:
        DataError: As `pair_tree`.
    """
    missing = [name for name in SIDES if row.fields.get(name) is None]
    if missing:
        has = ", ".join(name for name, value in row.fields.items() if value is not None) or "nothing"
        raise DataError(
            f"{row.origin}: has {has}; a pair needs 'chosen' and 'rejected'; rename with data.columns, "
            f"e.g. data.columns.{missing[0]}=NAME"
        )
    prompt, sides = row.fields.get("prompt"), tuple(row.fields[name] for name in SIDES)
    kinds = {isinstance(side, str) for side in sides}
    if len(kinds) == 2:
        raise DataError(f"{row.origin}: chosen and rejected must both be text or both be messages")
    written = kinds == {True}
    if isinstance(prompt, str) and written:
        return prompt, (sides[0], sides[1])
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        return prompt, (_after(prompt, sides[0]), _after(prompt, sides[1]))
    # A text beside conversations repeats what they begin with.
    return _shared_text(sides, row.origin) if written else _shared_turns(sides, row.origin)


def _after(prompt: Sequence[Message], side: Any) -> Prompt:
    """Return what a side adds to the prompt: some data repeats the prompt in both sides."""
    if isinstance(side, str):
        return [{"role": "assistant", "content": side}]
    start = list(prompt)
    return list(side[len(start) :]) if list(side[: len(start)]) == start else list(side)


def _shared_turns(sides: tuple[Any, ...], origin: str) -> tuple[Prompt, tuple[Prompt, Prompt]]:
    count = 0
    for one, other in zip(*sides, strict=False):
        if one != other:
            break
        count += 1
    # The answers are what differs: of two equal conversations, the last turn of each.
    count = min(count, min(map(len, sides)) - 1)
    while count > 0 and _role(sides[0][count]) != "assistant":
        count -= 1
    if count < 1:
        raise DataError(
            f"{origin}: chosen and rejected begin with different turns, so they share no prompt; give "
            "'prompt', or conversations that are the same up to an answer"
        )
    return sides[0][:count], (sides[0][count:], sides[1][count:])


def _shared_text(sides: tuple[Any, ...], origin: str) -> tuple[Prompt, tuple[Prompt, Prompt]]:
    one, other = sides
    count = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(map(len, sides))
    )
    # Back to where a word begins, with the space before it: tokenizers join the two.
    while count > 0 and (
        count >= min(map(len, sides)) or not one[count].isspace() or one[count - 1].isspace()
    ):
        count -= 1
    if not one[:count].strip():
        raise DataError(
            f"{origin}: chosen and rejected begin with different words, so they share no prompt; give "
            "'prompt'"
        )
    return one[:count], (one[count:], other[count:])


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None
