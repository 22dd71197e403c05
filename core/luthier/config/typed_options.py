"""What is typed for an option that is text stays that text, whatever Hydra's grammar would make of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from luthier.contracts import KINDS
from luthier.registry import catalogue, command

TEXT, OPTIONAL = (str, Path), (str | None, Path | None)
QUOTED = r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\""
PIECES = re.compile(rf"(?:{QUOTED}|\$\{{[^}}]*\}}|[^,])+")
ITEMS = re.compile(rf"{QUOTED}|(?<=[\[,])[^][{{}},'\"]+(?=[\],])")
CALL = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)")


def types(verb: str) -> dict[str, list[Any]]:
    """Return the types of every option of `verb` by dotted key, whatever methods are selected."""
    found: dict[str, list[Any]] = {"hydra.sweep.dir": [str], "hydra.sweep.subdir": [str]}
    of_methods = (
        declared
        for method in catalogue().all()
        for package in (KINDS[method.kind].package(method.name), f"eval_{KINDS[method.kind].group}")
        for declared in _declared(method.cls, f"{package}.")
    )
    for key, hint in (*_declared(command(verb).options, ""), *of_methods):
        found.setdefault(key, []).append(hint)
    return found


def typed(override: str, known: Mapping[str, list[Any]], several: bool) -> str:
    """Return `override` so that Hydra reads text as it was typed, and puts new keys into mappings.

    Args:
        override: ``KEY=VALUE``.
        known: What `types` returns.
        several: Whether commas separate the values of several runs.
    """
    name, equals, value = override.partition("=")
    key = name.lstrip("+")
    tables = _holders(key, known, dict, Mapping)
    if equals and is_text(key, known) and not (several and CALL.fullmatch(value)):
        optional = any(hint in OPTIONAL for hint in known.get(key, ()))
        pieces = (PIECES.findall(value) or [""]) if several else [value]
        value = ",".join(piece if optional and piece == "null" else as_text(piece) for piece in pieces)
    elif equals and is_text(f"{key}.*", known):
        value = ITEMS.sub(lambda item: as_text(item[0].strip()), value)
    return f"{'++' if tables and not name.startswith(('+', '~')) else ''}{name}{equals}{value}"


def as_text(value: str) -> str:
    """Return `value`, in quotes unless it has them or Hydra's grammar reads it as this text anyway."""
    if re.fullmatch(QUOTED, value):
        return value
    try:
        parsed = OverridesParser.create().parse_override(f"x={value}")
        as_typed = not parsed.is_sweep_override() and parsed.value() == value
    except HydraException:
        as_typed = False
    return value if as_typed else quoted(value)


def quoted(value: str) -> str:
    """Return `value` as Hydra's grammar reads it as text: backslashes count before quotes alone."""
    return "'" + re.sub(r"(\\*)('|$)", lambda end: end[1] * 2 + ("\\'" if end[2] else ""), value) + "'"


def is_text(key: str, known: Mapping[str, list[Any]]) -> bool:
    """Whether the option `key`, or what a mapping or a list holds at `key`, is text for all that have it."""
    hints = known.get(key) or [get_args(hint)[-1] for hint in _holders(key, known, dict, Mapping, list)]
    return bool(hints) and all(hint in (*TEXT, *OPTIONAL) for hint in hints)


def _holders(key: str, known: Mapping[str, list[Any]], *kinds: Any) -> list[Any]:
    parts = key.split(".")
    above = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return [hint for at in above for hint in known.get(at, ()) if get_origin(hint) in kinds]


def _declared(cls: type[Any], prefix: str) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if isinstance(field.default_factory, type) and dataclasses.is_dataclass(field.default_factory):
            yield from _declared(field.default_factory, f"{prefix}{field.name}.")
        elif "help" in field.metadata:
            yield f"{prefix}{field.name}", hints[field.name]
