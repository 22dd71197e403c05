"""What a row says is what is rendered: every turn's text, thoughts and calls, or the row is refused.

A template is tried with a word of its own in every place of a conversation of the same shape, which says what
it leaves out whatever the row says, and what it writes behind a turn's own text. What it leaves out of some
texts alone, such as earlier thoughts, is looked for in the rendering of the row itself.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from luthier.errors import DataError, UnusableRowError
from luthier.text.conversation import Conversation
from luthier.text.messages import functions
from luthier.text.said import A_THOUGHT


@dataclass(frozen=True)
class Outline:
    """How a template writes the conversations of one shape.

    Attributes:
        missing: What it leaves out, if it does.
        tail: What it writes behind the own text of the last turn; None: that is not known.
    """

    missing: str | None = None
    tail: str | None = None


def outline(conversation: Conversation, turn: int | None, thoughtful: Collection[int]) -> Outline:
    """Try the template on a conversation of the same shape.

    Args:
        conversation: Of the shape.
        turn: Up to this turn; None: as a prompt, all of it.
        thoughtful: Turns whose thoughts are to be written.
    """
    marked, marks = conversation.marked
    count = len(conversation.messages) if turn is None else turn + 1
    try:
        text = marked.until(count) if turn is None else marked.whole(count)
    except DataError:  # it takes no such words; what it makes of the row's own is looked at
        return Outline()
    needed = [
        (what, mark)
        for place, own in enumerate(marks[:count])
        for what, mark in own
        if what != A_THOUGHT or place in thoughtful
    ]
    missing = next((what for what, mark in needed if mark not in text), None)
    last = marks[count - 1][-1:]
    return Outline(missing, text.rpartition(last[0][1])[2] if last and last[0][1] in text else None)


def check_written(conversation: Conversation, text: str, turns: Sequence[int], thoughts: bool) -> None:
    """Check that everything that `turns` say, with their `thoughts` or without, stands in `text`.

    White space aside, and as it is or as in JSON.

    Raises:
        UnusableRowError: It does not.
    """
    packed = _packed(text)
    for turn in turns:
        for what, said in conversation.said[turn]:
            known = said in text or any(form in packed for form in _forms(said))
            if not known and (thoughts or what != A_THOUGHT):
                raise left_out(conversation.origin, what)


def check_tools(conversation: Conversation, text: str) -> None:
    """Check that every function that may be called stands in `text`.

    Raises:
        UnusableRowError: One does not.
    """
    for tool in functions(conversation.tools if isinstance(conversation.tools, list) else ()):
        if tool["name"] not in text:
            raise left_out(conversation.origin, f"the function '{tool['name']}'")


def left_out(origin: str, what: str) -> UnusableRowError:
    """Return the error for a row of which the template leaves out `what`."""
    way_out = "; model.chat_template takes another"
    return UnusableRowError(origin, f"with {what} that the chat template leaves out{way_out}")


def _packed(text: str) -> str:
    return "".join(text.split())


def _forms(text: str) -> list[str]:
    return [
        _packed(form) for form in (text, *(json.dumps(text, ensure_ascii=a)[1:-1] for a in (False, True)))
    ]
