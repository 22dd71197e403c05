"""Token ids as a person can read them: pieces of text, nothing invisible, no half characters."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

REPLACEMENT = "\ufffd"
"""What a decoder gives for bytes that are no whole character."""

_LONGEST = 8
_MARKS = {"\n": "↵\n", "\t": "⇥\t", "\r": "␍"}
# Emoji are made with these; on their own they are as harmless as they are unseen.
_JOINERS = "\u200d\ufe0e\ufe0f"


@dataclass(frozen=True)
class Piece:
    """One token, or as many as it takes to make whole characters.

    Attributes:
        text: The text, with what cannot be seen made visible.
        ids: Its token ids.
        place: Position of the first, counted from the beginning of the prompt.
        trained: The tokens are supervised.
        special: It is a token of the tokenizer's own, such as the one that ends a turn.
    """

    text: str
    ids: tuple[int, ...]
    place: int
    trained: bool
    special: bool


def pieces(
    tokenizer: Any, ids: Sequence[int], scored: Sequence[bool], before: Sequence[int] = ()
) -> tuple[Piece, ...]:
    """Cut `ids` into pieces.

    Args:
        tokenizer: A transformers tokenizer.
        ids: The tokens.
        scored: Which of them are supervised.
        before: The tokens in front of them, of which the last is context for the first of `ids`.
    """
    return tuple(_pieces(tokenizer, list(ids), scored, list(before)))


def _pieces(tokenizer: Any, ids: list[int], scored: Sequence[bool], before: list[int]) -> Iterator[Piece]:
    special = _special_ids(tokenizer)
    context = before[-1:]
    start = 0
    while start < len(ids):
        stop = start + 1
        if ids[start] not in special:
            limit = min(len(ids), start + _LONGEST)
            ends = (
                end for end in range(start + 1, limit) if ids[end] in special or scored[end] != scored[start]
            )
            stop = _whole(tokenizer, context, ids[start : next(ends, limit)]) + start
        text = _decode(tokenizer, context, ids[start:stop])
        yield Piece(
            visible(text),
            tuple(ids[start:stop]),
            len(before) + start,
            bool(scored[start]),
            ids[start] in special,
        )
        context = ids[start:stop]
        start = stop


def _special_ids(tokenizer: Any) -> set[int]:
    """Return the special tokens, those included that only a chat template uses."""
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}


def _whole(tokenizer: Any, context: list[int], ids: list[int]) -> int:
    """Return how many of `ids` make whole characters; 1 if none do, for the text may hold the sign itself."""
    counts = range(1, len(ids) + 1)
    whole = (count for count in counts if REPLACEMENT not in _decode(tokenizer, context, ids[:count]))
    return next(whole, 1)


def _decode(tokenizer: Any, context: list[int], ids: list[int]) -> str:
    # Many tokenizers drop the space a text begins with, so a token is read with the one before it.
    known, both = (_text(tokenizer, part) for part in (context, context + ids))
    return both[len(known) :] if both.startswith(known) else _text(tokenizer, ids)


def _text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def visible(text: str) -> str:
    """Return `text` with signs for line ends and tabs, and codes for what steers a terminal or a page."""
    return "".join(
        _MARKS.get(character) or (_code(character) if _unseen(character) else character) for character in text
    )


def _unseen(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp") and character not in _JOINERS


def _code(character: str) -> str:
    number = ord(character)
    return chr(0x2400 + number) if number < 0x20 else f"⟨U+{number:04X}⟩"
