"""The commands: plugins that are loaded without those of methods, so that help needs no torch."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from luthier.contracts import COMMAND
from luthier.registry.discovery import plugins
from luthier.registry.method_catalogue import Catalogue

if TYPE_CHECKING:
    from luthier.contracts import Command


@functools.cache
def commands() -> Catalogue:
    """Return the catalogue of the installed commands, loaded once per process."""
    return Catalogue([plugin for plugin in plugins() if plugin.kind == COMMAND.name])


def command_names() -> list[str]:
    """Return the sorted names of the commands."""
    return commands().names(COMMAND.name)


def composed_commands() -> list[str]:
    """Return the sorted names of the commands that take a config."""
    return [name for name in command_names() if command(name).composed]


def command(name: str) -> Command:
    """Return the command called `name`.

    Raises:
        PluginError: There is none, its plugin is broken, or two plugins registered it.
    """
    return commands().find(COMMAND.name, name).cls()  # type: ignore[no-any-return]
