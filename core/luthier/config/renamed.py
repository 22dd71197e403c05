"""Options that have a new name: for whoever writes the old one, and for configs of older runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from luthier.contracts import KINDS
from luthier.registry import catalogue, command, composed_commands


def new_name(key: str) -> str | None:
    """Return what the option `key`, or what holds it, is called now; None if it was never renamed."""
    pairs = [pair for name in composed_commands() for pair in renamed_options(command(name).options, "")]
    for method in catalogue().all():
        pairs += renamed_options(method.cls, f"{KINDS[method.kind].package(method.name)}.")
    names = (new + key.removeprefix(old) for old, new in pairs if key == old or key.startswith(f"{old}."))
    return next(names, None)


def renamed_options(cls: type[Any], prefix: str) -> Iterator[tuple[str, str]]:
    """Yield the old and the new name of the options of `cls` that have one, and of those that hold others."""
    for field in dataclasses.fields(cls):
        if old := field.metadata.get("was"):
            yield f"{prefix}{old}", f"{prefix}{field.name}"
        elif dataclasses.is_dataclass(field.default_factory):
            assert isinstance(field.default_factory, type)
            yield from renamed_options(field.default_factory, f"{prefix}{field.name}.")
