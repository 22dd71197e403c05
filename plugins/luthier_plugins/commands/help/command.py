"""The command `help`, which takes plain arguments."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from luthier import Command, Register, hookimpl


@dataclass(frozen=True)
class Help(Command):
    """Show the commands, or what one of them takes: ``luthier COMMAND --help`` is the same."""

    summary: ClassVar[str] = "the commands; the groups, options and examples of one: help COMMAND"
    examples: ClassVar[Sequence[str]] = ("help train", "help train adapter=dora objective=dpo")
    composed: ClassVar[bool] = False

    def run(self, config: Any) -> int:
        """Show help for the words `config`: a command and choices of its groups, or nothing."""
        if not config or config[0].startswith("-"):
            from luthier_plugins.commands.help.overview import show_overview

            return show_overview()
        from luthier_plugins.commands.help.usage import show_usage

        return show_usage(config[0], config[1:])


@hookimpl
def register_commands(register: Register) -> None:
    """Register `help`."""
    register("help", Help)
