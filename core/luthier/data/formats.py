"""Layouts of rows: from what a file holds to what objectives take, the same for every source.

An objective sees ``messages``, ``prompt`` with ``completion``, or ``text``. Rows of other layouts
(``chosen`` and ``rejected``, labels, steps) pass as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from luthier.contracts import DataSource, Row
from luthier.errors import DataError, nearest
from luthier.text import parse_json, read_messages, role_of

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
        fields["messages"] = read_messages(fields.pop("conversations"), "conversations", row.origin)
    elif layout == "instruction":
        fields.update(_from_instruction(fields, chat, row.origin))
    fields = _only(layout, fields) if layout else fields
    for name in (name for name in ("messages", "prompt", "completion", *OTHER) if _said(fields.get(name))):
        fields[name] = read_messages(fields[name], name, row.origin)
    # Sides of a pair may repeat the conversation; where none of these is one, the prompt is a text.
    begun = [name for name in ("messages", "prompt", *OTHER) if _begins(name, fields.get(name))]
    for name in begun or ["prompt"] * isinstance(fields.get("prompt"), str):
        fields[name] = _introduced(fields[name], fields.get("system"), row.origin)
    return replace(row, fields=fields)


def _begins(name: str, value: Any) -> bool:
    """Whether a column holds a conversation from its beginning: sides of a pair may be answers alone."""
    return isinstance(value, list) and (
        name not in OTHER or role_of((value or [None])[0]) in ("user", "system")
    )


def _said(value: Any) -> bool:
    """Whether a column holds a text, or messages; whatever else it is, its objective says what it expects."""
    return isinstance(value, str) or (isinstance(value, list) and any(isinstance(m, Mapping) for m in value))


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


def _introduced(messages: Any, system: Any, origin: str) -> Any:
    """Begin a conversation, or a text, with the column `system`, unless it has a system turn itself."""
    if system is not None and not isinstance(system, str):
        raise DataError(f"{origin}: system must be text, got {type(system).__name__}")
    if not system or not messages or role_of(messages[0]) == "system":
        return messages
    if isinstance(messages, str):
        return f"{system}\n\n{messages}"
    return [{"role": "system", "content": system}, *messages]


def _from_instruction(fields: Mapping[str, Any], chat: bool, origin: str) -> dict[str, Any]:
    parts = {}
    for name in ("instruction", "input", "output"):
        value = fields.get(name)
        parts[name] = "" if value is None else value
        if not isinstance(parts[name], str):
            raise DataError(f"{origin}: {name} must be text, got {type(value).__name__}")
    question = "\n\n".join(part for part in (parts["instruction"], parts["input"]) if part.strip())
    if not question:
        raise DataError(f"{origin}: the instruction is empty; drop the row or give it a text")
    rounds = _rounds(fields.get("history"), origin)
    if not chat:
        texts = [*(text for pair in rounds for text in pair), question]
        return {"prompt": "".join(f"{text}\n\n" for text in texts if text), "completion": parts["output"]}
    prompt = []
    for question_before, answer in rounds:
        prompt += [{"role": "user", "content": question_before}, {"role": "assistant", "content": answer}]
    prompt.append({"role": "user", "content": question})
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": parts["output"]}]}


def _rounds(history: Any, origin: str) -> list[tuple[str, str]]:
    """Return the earlier questions and answers of an instruction."""
    if isinstance(history, str):
        history = parse_json(history, f"{origin}: history") if history.strip() else None
    rounds = list(history) if isinstance(history, list | tuple) else [] if history is None else [history]
    for pair in rounds:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(t, str) for t in pair):
            raise DataError(f"{origin}: history must be a list of [question, answer], got {pair!r:.60}")
    return [(question, answer) for question, answer in rounds]


def asked(row: Row) -> Row | None:
    """Return `row` with the prompt that is to be answered and, where it has one, the answer that it gives.

    Of a conversation, the prompt is everything before its last assistant turn; where that is not the last
    turn of all, it is the whole. None: there is no prompt.
    """
    messages = row.fields.get("messages")
    if row.fields.get("prompt") is not None or not isinstance(messages, list) or not messages:
        return row if row.fields.get("prompt") is not None else None
    count = len(messages) - (role_of(messages[-1]) == "assistant")
    if not count:
        return None
    answer = {"completion": messages[count:]} if messages[count:] else {}
    return replace(row, fields={**row.fields, "prompt": messages[:count], **answer})


def _listed(names: Any) -> str:
    return ", ".join(map(str, names)) or "nothing"
