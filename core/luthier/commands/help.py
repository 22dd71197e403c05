"""``luthier VERB --help``: the verb's groups with their choices, and every option with its default."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection, Iterator
from typing import Any

from omegaconf import MISSING
from rich.console import Console
from rich.table import Table

from luthier import config
from luthier.contracts import KINDS
from luthier.registry import catalogue, command, composed_commands, presets


def show_usage(verb: str, overrides: list[str]) -> int:
    """Print the help of `verb`; with group choices in `overrides`, the options of those methods too."""
    console = Console(highlight=False)
    root = command(verb).options
    # Paragraphs, so that the terminal breaks the lines.
    said = "\n\n".join(" ".join(part.split()) for part in (inspect.getdoc(root) or "").split("\n\n"))
    console.print(f"{said}\n\nusage: luthier {verb} [GROUP=CHOICE …] [OPTION=VALUE …]\n")
    console.print("[bold]groups[/]")
    console.print(_grid(_groups(root)))
    chosen = dict(override.lstrip("+").split("=", 1) for override in overrides if "=" in override)
    for kind in KINDS.values():
        names = chosen.get(kind.group, "").strip("[]").split(",")
        for name in (name for name in names if name and name not in presets(kind.group)):
            cls = catalogue().find(kind.name, name).cls
            console.print(f"\n[bold]{kind.group}={name}[/]  {(cls.__doc__ or '').strip()}")
            console.print(_grid(_options(cls, f"{kind.package(name)}.")))
    # A verb that takes another's options names them after its own.
    base = next((name for name in composed_commands() if command(name).options is root.__base__), None)
    inherited = {field.name for field in dataclasses.fields(command(base).options)} if base else set()
    console.print("\n[bold]options[/]")
    console.print(_grid(_options(root, "", leave_out=inherited)))
    if base:
        console.print(f"\n[bold]options of {base}[/]")
        console.print(_grid(_options(command(base).options, "")))
    console.print(f"\nA method's own options: luthier {verb} GROUP=CHOICE --help")
    return 0


def _groups(root: type[Any]) -> Iterator[tuple[str, str]]:
    config.prepare()
    fields = {field.name for field in dataclasses.fields(root)}
    # A merge names its models itself, and recipes are for training.
    for group, needed in (("model", "model"), ("recipe", "adapter")):
        if needed in fields and (names := presets(group)):
            yield group, ", ".join(names)
    for kind in KINDS.values():
        if {kind.group, f"{kind.group}s"} & fields:
            yield kind.group, ", ".join([*catalogue().names(kind.name), *presets(kind.group)]) or "none"
    if "eval_data" in fields:
        yield "data@eval_data", "the held-out rows, from any source of data"


def _options(cls: type[Any], prefix: str, leave_out: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    # A group of options comes after the single ones; what a whole kind shares, after a method's own.
    own = sorted(dataclasses.fields(cls), key=lambda field: field.kw_only is True)
    fields = [field for field in own if field.name not in leave_out]
    for field in sorted(fields, key=lambda field: "help" not in field.metadata):
        if text := field.metadata.get("help"):
            yield f"{prefix}{field.name}", f"{text} [dim]{_default(field)}[/]"
        elif dataclasses.is_dataclass(field.default_factory):
            assert isinstance(field.default_factory, type)
            yield from _options(field.default_factory, f"{prefix}{field.name}.")


def _default(field: dataclasses.Field[Any]) -> str:
    made = field.default_factory
    value = field.default if made is dataclasses.MISSING else made()
    if value is dataclasses.MISSING or value == MISSING:
        return r"\[must be set]"
    return rf"\[{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}]"


def _grid(rows: Iterator[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(f"  {name}", text)
    return table
