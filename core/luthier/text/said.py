"""The texts that a message says: its content, thoughts and calls, each by what it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from luthier.text.messages import THOUGHTS, Message

THINK = re.compile(r"(</?think>)")
"""Between these stand thoughts within a content; templates look for them."""

A_THOUGHT = "a thought"
Each = Callable[[str, str], str]
"""Takes what a text is, and the text; returns another one for its place."""


def said_by(message: Message) -> list[tuple[str, str]]:
    """Return what each text in `message` is, and the text."""
    found: list[tuple[str, str]] = []

    def note(what: str, text: str) -> str:
        found.append((what, text))
        return text

    with_texts(message, note)
    return found


def with_texts(message: Message, each: Each) -> dict[str, Any]:
    """Return `message` with every text that it says, white space around it aside, put through `each`."""
    put: dict[str, Any] = {**message}
    for key in (key for key in THOUGHTS if isinstance(message.get(key), str)):
        put[key] = _put(message[key], A_THOUGHT, each)
    # Others may speak of the tags; a thought is the assistant's.
    parts = THINK.split(message["content"]) if message["role"] == "assistant" else [message["content"]]
    behind = max((place for place, part in enumerate(parts) if part == "</think>"), default=-1)
    whats = [A_THOUGHT if place < behind else f"a text of '{message['role']}'" for place in range(len(parts))]
    put["content"] = "".join(
        part if THINK.fullmatch(part) else _put(part, what, each)
        for part, what in zip(parts, whats, strict=True)
    )
    if calls := message.get("tool_calls"):
        put["tool_calls"] = [_in_call(call, each) for call in calls]
    return put


def in_messages(messages: Sequence[Message], each: Each) -> list[dict[str, Any]]:
    """Return `messages` with every text in them, names and ids too, put through `each`.

    Roles stay as they are, and the tags around thoughts.
    """
    said = [with_texts(message, each) for message in messages]
    kept = ("role", "content")
    return [{k: v if k in kept else in_value(v, each) for k, v in message.items()} for message in said]


def in_value(value: Any, each: Each) -> Any:
    """Return `value`, whatever a row holds, with every text in it put through `each`."""
    if isinstance(value, Mapping):
        return {each("a call", str(key)): in_value(part, each) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [in_value(part, each) for part in value]
    return _put(value, "a call", each) if isinstance(value, str) else value


def _in_call(call: Mapping[str, Any], each: Each) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return dict(call)
    kept = {key: in_value(value, each) for key, value in function.items() if key in ("name", "arguments")}
    return {**call, "function": {**function, **kept}}


def _put(text: str, what: str, each: Each) -> str:
    own = text.strip()
    start = len(text) - len(text.lstrip())
    return f"{text[:start]}{each(what, own)}{text[start + len(own) :]}" if own else text
