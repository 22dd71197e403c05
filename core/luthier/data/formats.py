"""Layouts of rows: from what a file holds to what objectives take, the same for every source.

An objective sees ``messages``, ``prompt`` with ``completion``, or ``text``. Rows of other layouts
(``chosen`` and ``rejected``, labels, steps) pass as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from luthier.contracts import DataSource, Row
from luthier.errors import DataError, nearest, unknown
from luthier.text import parse_json

LAYOUTS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
"""The columns that make a layout; of two layouts that fit, the first is meant."""

OTHER = ("chosen", "rejected")
"""Columns of layouts that only their objectives know."""

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "tool": "tool", "observation": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
"""ShareGPT's names of roles, and the chat templates'."""


def laid_out(row: Row, source: DataSource, chat: bool) -> Row:
    """Return `row` with its columns renamed and in a layout that objectives take.

    Args:
        row: As a source yielded it.
        source: The source that is read; the row's own, if it has one, decides.
        chat: Make chat messages of instructions; False (a tokenizer without template): text.

    Raises:
        DataError: A column is missing or holds something else; the message names the row.
    """
    owner = row.source or source
    fields = _renamed(row.fields, owner.columns, row.origin)
    layout: str = _layout_of(fields, owner.columns) if owner.format == "auto" else owner.format
    # A layout that was found has its columns; one that was asked for may not.
    if missing := [name for name in LAYOUTS.get(layout, ()) if fields.get(name) is None]:
        raise DataError(
            f"{row.origin}: format={layout} needs {_listed(LAYOUTS[layout])}; the row has {_listed(fields)}; "
            f"{nearest(missing[0], fields)}say which column it is with columns.{missing[0]}=NAME"
        )
    if isinstance(fields.get("tools"), str):
        fields["tools"] = parse_json(fields["tools"], f"{row.origin}: tools") if fields["tools"] else None
    if layout == "sharegpt":
        fields["messages"] = _from_sharegpt(fields.pop("conversations"), row.origin)
    elif layout == "instruction":
        fields.update(_from_instruction(fields, chat, row.origin))
    if layout in ("sharegpt", "messages"):
        fields["messages"] = _introduced(fields["messages"], fields.get("system"), row.origin)
    return replace(row, fields=_only(layout, fields) if layout else fields)


def _layout_of(fields: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """Return the layout whose columns are there, first of all one that `columns` names, or an empty text."""
    if any(fields.get(name) is not None for name in OTHER):
        return ""
    ordered = sorted(LAYOUTS, key=lambda name: not set(LAYOUTS[name]) & set(columns))
    fits = (name for name in ordered if all(fields.get(key) is not None for key in LAYOUTS[name]))
    return next(fits, "")


def _only(layout: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Leave out the columns of other layouts, which an objective or a comparison of rows might prefer."""
    mine = LAYOUTS[{"sharegpt": "messages", "instruction": "completion"}.get(layout, layout)]
    others = {name for names in LAYOUTS.values() for name in names} - set(mine)
    return {name: value for name, value in fields.items() if name not in others}


def _renamed(fields: Mapping[str, Any], columns: Mapping[str, str], origin: str) -> dict[str, Any]:
    for wanted, name in columns.items():
        if name not in fields:
            raise DataError(
                f"{origin}: there is no column '{name}' (columns.{wanted}): "
                f"{nearest(name, fields)}the row has {_listed(fields)}"
            )
    kept = {name: value for name, value in fields.items() if name not in columns.values()}
    return {**kept, **{wanted: fields[name] for wanted, name in columns.items()}}


def _from_sharegpt(turns: Any, origin: str) -> list[dict[str, Any]]:
    if not isinstance(turns, list) or not turns:
        description = "an empty list" if turns == [] else type(turns).__name__
        raise DataError(f"{origin}: conversations must be a list of turns, got {description}")
    return [
        _from_turn(turn, f"{origin}: conversations, turn {number}") for number, turn in enumerate(turns, 1)
    ]


def _from_turn(turn: Any, where: str) -> dict[str, Any]:
    if isinstance(turn, Mapping) and "role" in turn:
        # The name of one layout over the turns of another, as many files have it.
        return dict(turn)
    if not isinstance(turn, Mapping) or not isinstance(turn.get("from"), str):
        raise DataError(f"{where}: expected {{'from': …, 'value': …}}")
    if turn["from"] not in ROLES:
        raise DataError(f"{where}: {unknown('from', turn['from'], ROLES)}")
    if not isinstance(turn.get("value"), str):
        raise DataError(f"{where}: value must be text, got {type(turn.get('value')).__name__}")
    if turn["from"] != "function_call":
        return {"role": ROLES[turn["from"]], "content": turn["value"]}
    called = parse_json(turn["value"], where)
    calls = called if isinstance(called, list) else [called]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise DataError(f"{where}: a function_call must be JSON of {{'name': …, 'arguments': …}}")
    tool_calls = [{"type": "function", "function": call} for call in calls]
    return {"role": "assistant", "content": "", "tool_calls": tool_calls}


def _introduced(messages: Any, system: Any, origin: str) -> Any:
    """Begin a conversation with the row's column `system`, unless it begins with a system turn itself."""
    if system is not None and not isinstance(system, str):
        raise DataError(f"{origin}: system must be text, got {type(system).__name__}")
    first = messages[0] if isinstance(messages, list) and messages else None
    if not system or not isinstance(first, Mapping) or first.get("role") == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _from_instruction(fields: Mapping[str, Any], chat: bool, origin: str) -> dict[str, Any]:
    parts = {}
    for name in ("instruction", "input", "output", "system"):
        value = fields.get(name)
        parts[name] = "" if value is None else value
        if not isinstance(parts[name], str):
            raise DataError(f"{origin}: {name} must be text, got {type(value).__name__}")
    question = "\n\n".join(part for part in (parts["instruction"], parts["input"]) if part.strip())
    if not question:
        raise DataError(f"{origin}: the instruction is empty; drop the row or give it a text")
    if not chat:
        start = f"{parts['system']}\n\n" if parts["system"] else ""
        return {"prompt": f"{start}{question}\n\n", "completion": parts["output"]}
    system = [{"role": "system", "content": parts["system"]}] if parts["system"] else []
    prompt = [*system, {"role": "user", "content": question}]
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": parts["output"]}]}


def _listed(names: Any) -> str:
    return ", ".join(map(str, names)) or "nothing"
