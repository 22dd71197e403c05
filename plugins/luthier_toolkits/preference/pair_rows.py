"""Rows of pairs: from prompt, chosen and rejected, in every layout they come in, to one tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from luthier.contracts import Row
from luthier.errors import DataError, UnusableRowError
from luthier.text import Codec, Message, Prompt, read_messages, says_nothing
from luthier.trees import Tree

SIDES = ("chosen", "rejected")

REPEATED = 4
"""Words of a prompt from which texts that both begin with it are taken to repeat it."""


def pair_tree(row: Row, codec: Codec) -> Tree:
    """Return the tree of a row: its prompt with the chosen and the rejected completion.

    Raises:
        UnusableRowError: A side is empty.
        DataError: A column is missing or of another type, or the sides do not share a prompt; the message
            names the row.
    """
    prompt, sides = split_pair(row)
    for name, side in zip(SIDES, sides, strict=True):
        _refuse_empty(name, side, row.origin)
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
        UnusableRowError: A side is empty where the prompt is to be found in both.
        DataError: As `pair_tree`.
    """
    prompt, chosen, rejected = (_typed(row, name) for name in ("prompt", *SIDES))
    if chosen is None or rejected is None:
        has = ", ".join(name for name, value in row.fields.items() if value is not None) or "nothing"
        raise DataError(
            f"{row.origin}: has {has}; a pair needs 'chosen' and 'rejected'; rename with data.columns, "
            f"e.g. data.columns.{'rejected' if rejected is None else 'chosen'}=NAME"
        )
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError(f"{row.origin}: chosen and rejected must both be text or both be messages")
    if isinstance(prompt, str):
        return _after_text(prompt, chosen, rejected, row.origin)
    if prompt is not None:
        return prompt, (_after_turns(prompt, chosen), _after_turns(prompt, rejected))
    for name, side in zip(SIDES, (chosen, rejected), strict=True):
        _refuse_empty(name, side, row.origin)
    return (
        _shared_text(chosen, rejected, row.origin)
        if isinstance(chosen, str)
        else _shared_turns(chosen, rejected, row.origin)
    )


def _typed(row: Row, name: str) -> Any:
    """Return a column: a text, a list of messages by the names that templates know, or None."""
    value = row.fields.get(name)
    # An empty list says nothing, as an empty text does.
    return value if value is None or value == [] else read_messages(value, name, row.origin)


def _refuse_empty(name: str, side: Any, origin: str) -> None:
    if says_nothing(side):
        raise UnusableRowError(origin, f"with an empty side: '{name}'")


def _after_text(prompt: str, chosen: Any, rejected: Any, origin: str) -> tuple[Prompt, tuple[Prompt, Prompt]]:
    """Return prompt and sides of a row whose prompt is a text."""
    if isinstance(chosen, str):
        repeated = _begins(chosen, prompt) and _begins(rejected, prompt)
        return prompt, ((chosen[len(prompt) :], rejected[len(prompt) :]) if repeated else (chosen, rejected))
    if all(side and side[0].get("role") == "assistant" for side in (chosen, rejected)):
        return [{"role": "user", "content": prompt}], (chosen, rejected)
    turns, sides = _shared_turns(chosen, rejected, origin)
    asked = [str(turn.get("content")).strip() for turn in turns if not isinstance(turn, str)]
    if prompt.strip() not in asked:
        raise DataError(
            f"{origin}: the prompt is none of the turns that chosen and rejected share; leave it out, or "
            "give completions alone"
        )
    return turns, sides


def _begins(side: str, prompt: str) -> bool:
    """Whether `side` repeats `prompt`: a greeting, or a word, may well begin an answer by itself."""
    return len(prompt.split()) >= REPEATED and side.startswith(prompt)


def _after_turns(prompt: Sequence[Message], side: Any) -> Prompt:
    """Return what a side adds to the prompt: some data repeats the prompt in both sides."""
    if isinstance(side, str):
        return [{"role": "assistant", "content": side}] if side.strip() else ""
    start = list(prompt)
    return list(side[len(start) :]) if list(side[: len(start)]) == start else list(side)


def _shared_turns(first: Any, second: Any, origin: str) -> tuple[Prompt, tuple[Prompt, Prompt]]:
    count, sides = 0, (first, second)
    for turn, other in zip(*sides, strict=False):
        if turn != other:
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


def _shared_text(chosen: str, rejected: str, origin: str) -> tuple[Prompt, tuple[Prompt, Prompt]]:
    sides = chosen, rejected
    count = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(map(len, sides))
    )
    # Back to where a word begins, with the space before it: tokenizers join the two.
    while count > 0 and (
        count >= min(map(len, sides)) or not chosen[count].isspace() or chosen[count - 1].isspace()
    ):
        count -= 1
    if not chosen[:count].strip():
        raise DataError(
            f"{origin}: chosen and rejected begin with different words, so they share no prompt; give "
            "'prompt'"
        )
    return chosen[:count], (chosen[count:], rejected[count:])


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None
