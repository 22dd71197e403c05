"""The commands, found by entry-point metadata."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from luthier.errors import LuthierError, unknown
from luthier.registry.discovery import CORE

if TYPE_CHECKING:
    from luthier.contracts import Command

GROUP = "luthier.commands"


@functools.cache
def _entries() -> Mapping[str, EntryPoint]:
    entries = entry_points(group=GROUP)
    return {entry.name: entry for entry in entries if entry.dist is not None and entry.dist.name == CORE}


def command_names() -> list[str]:
    """Return the sorted names of the commands; nothing is imported."""
    return sorted(_entries())


def composed_commands() -> list[str]:
    """Return the sorted names of the commands that take a config."""
    return [name for name in command_names() if command(name).composed]


@functools.cache
def command(name: str) -> Command:
    """Return the command called `name`.

    Raises:
        LuthierError: There is none.
    """
    if name not in _entries():
        raise LuthierError(unknown("command", name, command_names()))
    return _entries()[name].load()  # type: ignore[no-any-return]
