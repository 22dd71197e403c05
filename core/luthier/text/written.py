"""What a row says is what is rendered: every turn's text, thoughts and calls, or the row is refused.

A template is tried with a word of its own in every place of a conversation of the same shape, which says what
it leaves out whatever the row says, and what it writes behind a turn's own text. What it leaves out of some
texts alone, such as earlier thoughts, is looked for in the rendering of the row itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from luthier.errors import DataError, UnusableRowError
from luthier.text.conversation import Conversation
from luthier.text.messages import THOUGHTS, Message, functions

THINK = re.compile(r"(</?think>)")
"""Between these stand thoughts within a content; templates look for them."""

A_THOUGHT = "a thought"
Each = Callable[[str, str], str]
"""Takes what a text is, and the text; returns another one for its place."""


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
    marked, marks = _marked(conversation)
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


def shape_of(conversation: Conversation) -> str:
    """Return what conversations of one shape have in common."""
    return repr((_marked(conversation)[0].messages, conversation.tools))


def check_written(conversation: Conversation, text: str, turns: Sequence[int], thoughts: bool) -> None:
    """Check that everything that `turns` say, with their `thoughts` or without, stands in `text`.

    White space aside, and as it is or as in JSON.

    Raises:
        UnusableRowError: It does not.
    """
    packed = _packed(text)
    for turn in turns:
        for what, said in said_by(conversation.messages[turn]):
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


def said_by(message: Message) -> Iterator[tuple[str, str]]:
    """Yield what each text in `message` is, and the text."""
    found: list[tuple[str, str]] = []

    def note(what: str, text: str) -> str:
        found.append((what, text))
        return text

    with_texts(message, note)
    yield from found


def with_texts(message: Message, each: Each) -> dict[str, Any]:
    """Return `message` with every text that it says, white space around it aside, put through `each`."""
    put: dict[str, Any] = {**message}
    for key in (key for key in THOUGHTS if isinstance(message.get(key), str)):
        put[key] = _put(message[key], A_THOUGHT, each)
    parts = THINK.split(message["content"])
    behind = max((place for place, part in enumerate(parts) if part == "</think>"), default=-1)
    whats = [A_THOUGHT if place < behind else f"a text of '{message['role']}'" for place in range(len(parts))]
    put["content"] = "".join(
        part if THINK.fullmatch(part) else _put(part, what, each)
        for part, what in zip(parts, whats, strict=True)
    )
    if calls := message.get("tool_calls"):
        put["tool_calls"] = [_in_call(call, each) for call in calls]
    return put


def _in_call(call: Mapping[str, Any], each: Each) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return dict(call)
    kept = {key: _in_value(value, each) for key, value in function.items() if key in ("name", "arguments")}
    return {**call, "function": {**function, **kept}}


def _in_value(value: Any, each: Each) -> Any:
    if isinstance(value, Mapping):
        return {each("a call", str(key)): _in_value(part, each) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_in_value(part, each) for part in value]
    return _put(value, "a call", each) if isinstance(value, str) else value


def _put(text: str, what: str, each: Each) -> str:
    own = text.strip()
    start = len(text) - len(text.lstrip())
    return f"{text[:start]}{each(what, own)}{text[start + len(own) :]}" if own else text


def _marked(conversation: Conversation) -> tuple[Conversation, list[list[tuple[str, str]]]]:
    """Return the conversation with a word of its own for every text, and those words by message."""
    marks: list[list[tuple[str, str]]] = []

    def mark(what: str, _: str) -> str:
        marks[-1].append((what, f"zq{len(marks)}x{len(marks[-1])}qz"))
        return marks[-1][-1][1]

    messages = []
    for message in conversation.messages:
        marks.append([])
        messages.append(with_texts(message, mark))
    return replace(conversation, messages=messages), marks


def _packed(text: str) -> str:
    return "".join(text.split())


def _forms(text: str) -> list[str]:
    return [
        _packed(form) for form in (text, *(json.dumps(text, ensure_ascii=a)[1:-1] for a in (False, True)))
    ]
