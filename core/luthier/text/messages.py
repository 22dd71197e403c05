"""Chat messages: what is one, by whatever names data has for its parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from luthier.errors import DataError, UnusableRowError, unknown
from luthier.text.bounds import LONGEST
from luthier.text.json_values import parse_json

Message = Mapping[str, Any]

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "chatgpt": "assistant", "ai": "assistant", "function_call": "assistant", "tool_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
    "function_response": "tool", "tool_response": "tool", "tool_result": "tool",
}  # fmt: skip
"""The role that every name of one means."""

CALLING = ("function_call", "tool_call")
"""Roles whose content is a call, as JSON."""

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
FLAGS = ("weight", "loss", "train", "trainable", "training", "loss_mask", "step_loss_mask")
"""Keys by which data says whether an assistant's turn is trained."""

LINKS = ("tool_call_id", "id", "index")
KEYS = ("role", "content", "tool_calls", "function_call", "name", *THOUGHTS, *FLAGS, *LINKS)


def read_messages(value: Any, what: str, origin: str) -> Any:
    """Return a text as it is, and a list of messages with the names of their parts that templates know.

    A list may be JSON text, as CSV and Parquet files have it; a content may be a list of text parts. Roles
    are those of `ROLES`, but names of a system or tool role stay, which a template may know by themselves.

    Args:
        value: What a row holds.
        what: The name of its column.
        origin: Where the row stands.

    Raises:
        DataError: It is neither; the message says what it is.
    """
    if isinstance(value, str):
        check_length(len(value), origin)
        listed = _listed(value)
        return value if listed is None else read_messages(listed, what, origin)
    if not isinstance(value, Sequence) or isinstance(value, bytes) or not value:
        empty = isinstance(value, Sequence) and not isinstance(value, bytes)
        description = "an empty list" if empty else type(value).__name__
        raise DataError(f"{origin}: {what} must be text or a list of messages, got {description}")
    messages = [_message(one, f"{origin}: {what}, message {place}") for place, one in enumerate(value, 1)]
    check_length(sum(len(message["content"]) for message in messages), origin)
    return messages


def check_length(characters: int, origin: str) -> None:
    """Refuse a text that would take minutes to tokenise, and that no model takes.

    Raises:
        UnusableRowError: It is longer than `LONGEST`.
    """
    if characters > LONGEST:
        raise UnusableRowError(origin, f"with a text of more than {LONGEST:,} characters")


def role_of(message: Any) -> str | None:
    """Return the role that a message has, by whatever name; None: it has none that is known."""
    name = message.get("role", message.get("from")) if isinstance(message, Mapping) else None
    return ROLES.get(name.strip().lower()) if isinstance(name, str) else None


def is_empty(message: Message) -> bool:
    """Return whether `message` neither says nor calls anything."""
    return not (message.get("content") or "").strip() and not message.get("tool_calls")


def says_nothing(side: str | Sequence[Message]) -> bool:
    """Return whether a completion, a text or messages, is empty."""
    return not side.strip() if isinstance(side, str) else all(map(is_empty, side))


def is_trained(message: Message) -> bool:
    """Return whether none of the flags of `message` says that it is not to be trained."""
    return all(message.get(flag, 1) for flag in FLAGS)


def functions(of: Any) -> list[Mapping[str, Any]]:
    """Return what a list of tools or of calls says of each function: its name, arguments and more."""
    inner = [item.get("function", item) for item in of or () if isinstance(item, Mapping)]
    return [call for call in inner if isinstance(call, Mapping) and isinstance(call.get("name"), str)]


def plain(message: Message, template: str, as_text: bool) -> dict[str, Any]:
    """Return `message` as `template` expects it.

    A role of a system or tool goes by its own name where the template has it, a thought by the key that the
    template reads, and arguments of calls as JSON text or, usually, as a mapping.
    """
    kept = {key: value for key, value in message.items() if key not in FLAGS and key not in THOUGHTS}
    if not any(f"{quote}{kept['role']}{quote}" in template for quote in "'\""):
        kept["role"] = ROLES[kept["role"]]
    for key in (key for key in THOUGHTS if key in message):
        kept[next((known for known in (key, *THOUGHTS) if known in template), key)] = message[key]
    if as_text and "tool_calls" in kept:
        kept["tool_calls"] = [_as_text(call) for call in kept["tool_calls"]]
    return kept


def shortened(text: str, limit: int) -> str:
    """Return `text` in one line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def _listed(text: str) -> list[Any] | None:
    """Return the messages that `text` is as JSON; None: it is a text."""
    if not text.lstrip().startswith("[") or not ('"role"' in text or '"from"' in text):
        return None
    try:
        listed = parse_json(text, "")
    except DataError:
        return None
    return listed if isinstance(listed, list) and all(map(role_of, listed)) else None


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DataError(f"{where}: expected {{'role': …, 'content': …}}")
    kept = {
        key: value
        for key, value in message.items()
        if value is not None and not (key in THOUGHTS and isinstance(value, str) and not value.strip())
    }
    if "from" in kept and "role" not in kept:
        kept = {"role": kept.pop("from"), "content": kept.pop("value", None), **kept}
    if not isinstance(name := kept.get("role"), str):
        raise DataError(f"{where}: expected {{'role': …, 'content': …}}")
    if not (role := role_of(kept)):
        raise DataError(f"{where}: {unknown('role', name, ROLES)}")
    kept["role"] = role if role in ("user", "assistant") else name.strip().lower()
    _check_keys(kept, where)
    content, thoughts = _content(kept.get("content"), where)
    calling = name.strip().lower() in CALLING
    calls = _calls(kept, calling, content, where)
    kept = {**kept, "content": "" if calling else content or "", "tool_calls": calls, **thoughts}
    if content is None and not calls and not any(key in kept for key in THOUGHTS):
        raise DataError(f"{where}: content must be text, got NoneType")
    return kept if calls else {key: value for key, value in kept.items() if key != "tool_calls"}


def _check_keys(message: Message, where: str) -> None:
    """Refuse a key that is nearly one that is read, and flags that say neither yes nor no."""
    for key, value in message.items():
        near = [] if key in KEYS else get_close_matches(str(key), KEYS, n=1, cutoff=0.8)
        if near:
            raise DataError(f"{where}: unknown key '{key}': did you mean '{near[0]}'?")
        if key in FLAGS and (not isinstance(value, bool | int | float) or value not in (0, 1)):
            raise DataError(f"{where}: {key} must be true or false (1 or 0), got {value!r}")


def _content(content: Any, where: str) -> tuple[str | None, dict[str, str]]:
    """Return the text of a content, and the thoughts that stand among its parts."""
    if content is None or isinstance(content, str):
        return content, {}
    if not isinstance(content, list | tuple):
        raise DataError(f"{where}: content must be text, got {type(content).__name__}")
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        said = part.get(kind) if isinstance(part, Mapping) else part
        if kind not in ("text", *THOUGHTS) or not isinstance(said, str):
            raise DataError(f"{where}: a part of its content is of type '{kind}'; Luthier takes text parts")
        (texts if kind == "text" else thoughts).append(said)
    return "".join(texts), {THOUGHTS[0]: "\n".join(thoughts)} if thoughts else {}


def _calls(message: dict[str, Any], calling: bool, content: str | None, where: str) -> list[dict[str, Any]]:
    """Return the calls of a message: a list, JSON text, an old single one, or its content."""
    calls = content if calling else message.pop("function_call", message.get("tool_calls"))
    if isinstance(calls, str):
        calls = parse_json(calls, f"{where}: calls") if calls.strip() else None
    calls = [calls] if isinstance(calls, Mapping) else calls or []
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise DataError(f"{where}: tool_calls must be a list of calls, got {type(calls).__name__}")
    found = functions(calls)
    if calling and not len(found) == len(calls) > 0:
        raise DataError(f"{where}: a call must be JSON of {{'name': …, 'arguments': …}}")
    return [_call(call) for call in calls]


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call with its function apart, and arguments as a mapping where they are one as JSON text."""
    if not functions([call]):
        return dict(call)
    function = call.get("function", call)
    call = call if function is not call else {"type": "function", "function": call}
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return dict(call)
    return {**call, "function": {**function, "arguments": arguments}}


def _as_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or isinstance(function.get("arguments", ""), str):
        return dict(call)
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}
