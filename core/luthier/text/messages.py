"""Chat messages: what is one, and what a template is given of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.errors import DataError

Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
_MEANT = {"human": "user", "gpt": "assistant"}
"""Roles by the names of another layout; templates write a wrong one without a word."""


def check_prompt(value: object, what: str, origin: str) -> None:
    """Check that `value` is text, or a list of messages with a role and a content.

    A message that calls tools may have no content.

    Raises:
        DataError: It is neither; the message says what it is.
    """
    if isinstance(value, str):
        return
    if not isinstance(value, Sequence) or isinstance(value, bytes) or not value:
        empty = isinstance(value, Sequence) and not isinstance(value, bytes)
        description = "an empty list" if empty else type(value).__name__
        raise DataError(f"{origin}: {what} must be text or a list of messages, got {description}")
    for number, message in enumerate(value, 1):
        where = f"{origin}: {what}, message {number}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: expected {{'role': …, 'content': …}}")
        small = message["role"].strip().lower()
        meant = _MEANT.get(small, small if small in ROLES else message["role"])
        if meant != message["role"]:
            raise DataError(f"{where}: unknown role '{message['role']}': did you mean '{meant}'?")
        calls, content = message.get("tool_calls"), message.get("content")
        if calls is not None and (
            not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls)
        ):
            raise DataError(f"{where}: tool_calls must be a list of calls, got {type(calls).__name__}")
        if not isinstance(content, str) and not (content is None and calls):
            raise DataError(f"{where}: content must be text, got {type(content).__name__}")


def is_empty(message: Message) -> bool:
    """Return whether `message` neither says nor calls anything."""
    return not (message.get("content") or "").strip() and not message.get("tool_calls")


def plain(message: Message) -> dict[str, Any]:
    """Return `message` as templates expect it, whatever file it comes from.

    What is null, and an empty list of calls, is absent; the content of a call is empty text, which
    a template would write as "None"; a call's arguments are a mapping, not JSON text, which a template would
    quote once more.
    """
    kept = {name: value for name, value in message.items() if value is not None}
    if calls := kept.pop("tool_calls", None):
        kept["tool_calls"] = [_call(call) for call in calls]
    return {**kept, "content": kept.get("content", "")}


def functions(of: Any) -> list[str]:
    """Return the names of the functions in a list of tools or of calls."""
    inner = [item.get("function", item) for item in of or () if isinstance(item, Mapping)]
    return [call["name"] for call in inner if isinstance(call, Mapping) and isinstance(call.get("name"), str)]


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return dict(call)
    return {**call, "function": {**function, "arguments": arguments}}


def shortened(text: str, limit: int) -> str:
    """Return `text` in one line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
