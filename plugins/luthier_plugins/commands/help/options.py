"""The options of a dataclass as rows of a table: name, what it does, default."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from omegaconf import MISSING
from rich.markup import escape
from rich.table import Table


def options(cls: type[Any], prefix: str = "", leave_out: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """Yield name and text of every option of `cls`: single ones first, then those of groups within it."""
    # What a whole kind shares comes after a method's own.
    own = sorted(dataclasses.fields(cls), key=lambda field: field.kw_only is True)
    fields = [field for field in own if field.name not in leave_out]
    for field in sorted(fields, key=lambda field: "help" not in field.metadata):
        if text := field.metadata.get("help"):
            yield f"{prefix}{field.name}", f"{escape(text)} [dim]{_default(field)}[/]"
        elif isinstance(field.default_factory, type) and dataclasses.is_dataclass(field.default_factory):
            yield from options(field.default_factory, f"{prefix}{field.name}.")


def grid(rows: Iterable[tuple[str, str]]) -> Table:
    """Return a table of two columns, the first one as wide as it must be."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(f"  {name}", text)
    return table


def _default(field: dataclasses.Field[Any]) -> str:
    made = field.default_factory
    value = field.default if made is dataclasses.MISSING else made()
    if value is dataclasses.MISSING or value == MISSING:
        return r"\[must be set]"
    if value in ([], {}):
        return r"\[empty]"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return escape(f"[{text}]")
