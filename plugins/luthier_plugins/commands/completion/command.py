"""The command `completion`, which takes plain arguments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from luthier import Command, Register, hookimpl


@dataclass(frozen=True)
class Completion(Command):
    """Print what makes a shell complete luthier's commands, groups, choices and options."""

    summary: ClassVar[str] = "what makes bash, zsh or fish complete commands, groups, choices and options"
    examples: ClassVar[Sequence[str]] = ("completion bash >> ~/.bashrc",)
    subcommands: ClassVar[Mapping[str, str]] = {
        "bash": "for ~/.bashrc",
        "zsh": "for ~/.zshrc, below compinit",
        "fish": "for ~/.config/fish/completions/luthier.fish",
    }
    composed: ClassVar[bool] = False

    def run(self, config: Any) -> int:
        """Print the script of the shell that the words `config` name, or candidates for a line."""
        from luthier_plugins.commands.completion.scripts import run

        return run(config)


@hookimpl
def register_commands(register: Register) -> None:
    """Register `completion`."""
    register("completion", Completion)
