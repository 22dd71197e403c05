"""The command `plugins`, which takes plain arguments."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from luthier import Command, Register, hookimpl


@dataclass(frozen=True)
class Plugins(Command):
    """List the installed plugins, or write a package to start one from."""

    summary: ClassVar[str] = "what is registered, from which package and version; new ones to start from"
    subcommands: ClassVar[Mapping[str, str]] = {"new": "write a plugin package that works: new KIND NAME"}
    composed: ClassVar[bool] = False

    def run(self, config: Any) -> int:
        """Do what the words `config` say, and return the exit status."""
        from luthier_plugins.commands.plugins.arguments import run

        return run(config)


@hookimpl
def register_commands(register: Register) -> None:
    """Register `plugins`."""
    register("plugins", Plugins)
