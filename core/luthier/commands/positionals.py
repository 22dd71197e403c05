"""Bare words and flags of a command line, written as Hydra reads them wherever they stand."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from luthier import config
from luthier.errors import ConfigError

if TYPE_CHECKING:
    from luthier.contracts import Command

INSTEAD = {
    **dict.fromkeys(("-cp", "--config-path", "-cn", "--config-name"), "luthier {} FOLDER/FILE.yaml"),
    **dict.fromkeys(("-sc", "--shell-completion"), 'eval "$(luthier completion bash)"'),
    **dict.fromkeys(("-i", "--info", "-hh", "--hydra-help"), "luthier {0} --help, or luthier {0} --cfg job"),
}
"""Flags of Hydra's programs, and what to write for them."""


@dataclass(frozen=True)
class CommandLine:
    """What stands behind a command's name.

    Attributes:
        overrides: What Hydra reads, in the order in which it was typed.
        file: A YAML file of one's own, or the config of a run.
        folders: Where presets and recipes of one's own are.
        multirun: Whether every combination of the values is run.
        shows: What part of the config is printed, instead of a run: ``job``, ``hydra`` or ``all``; or None.
        package: What node of it alone; None: all.
        resolve: Whether interpolations in it are resolved.
    """

    overrides: list[str]
    file: str | None = None
    folders: list[str] = field(default_factory=list)
    multirun: bool = False
    shows: str | None = None
    package: str | None = None
    resolve: bool = False

    def sources(self) -> list[Path]:
        """Return every folder of configs of one's own: a file's is one."""
        beside = [os.path.dirname(self.file)] if self.file else []
        return [Path(folder) for folder in (*self.folders, *beside)]


class _Flags(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; known: -m, --cfg job, --package NAME, --resolve, --config-dir FOLDER")


def parsed(name: str, command: Command, words: Sequence[str]) -> CommandLine:
    """Return what `words` say, with the bare ones given the names that the command's `positionals` say.

    Args:
        name: The command's name.
        command: What `positionals` belong to.
        words: Overrides, flags and bare words, in the order in which they were typed.

    Raises:
        ConfigError: A flag is unknown or lacks its value; the command takes fewer bare words; one of them
            fills an option that is given by name too.
    """
    for word in words:
        if (flag := word.partition("=")[0]) in INSTEAD:
            raise ConfigError(f"{flag} is no flag of luthier; write: {INSTEAD[flag].format(name)}")
    flags = _Flags(add_help=False, allow_abbrev=False)
    flags.add_argument("-m", "--multirun", action="store_true")
    flags.add_argument("-c", "--cfg", dest="shows", choices=("job", "hydra", "all"))
    flags.add_argument("-p", "--package")
    flags.add_argument("--resolve", action="store_true")
    flags.add_argument("-cd", "--config-dir", dest="folders", action="append", default=[])
    known, others = flags.parse_known_args(words)
    if wrong := [word for word in others if word.startswith("-")]:
        flags.error(f"'{wrong[0]}' is no flag")
    if missing := [folder for folder in known.folders if not os.path.isdir(folder)]:
        flags.error(f"--config-dir={missing[0]} is no folder")
    files = [word for word in others if "=" not in word and word.endswith((".yaml", ".yml"))]
    if len(files) > 1:
        raise ConfigError(f"'{files[1]}' is a file too many: one may name the other in its defaults list")
    rest = [word for word in others if word not in files]
    return CommandLine(_named(name, command, rest), file=files[0] if files else None, **vars(known))


def _named(name: str, command: Command, words: Sequence[str]) -> list[str]:
    bare = [word for word in words if not word.startswith(("+", "~")) and "=" not in word]
    places = [place for place in command.positionals if isinstance(place, str)]
    values = [config.quoted(word) for word in bare]
    if ... in command.positionals and len(values) >= len(places):
        single = len(places) - 1
        values = [*values[:single], f"[{','.join(values[single:])}]"]
    if len(values) > len(places):
        takes = " ".join(place.rpartition(".")[2].upper() for place in places) or "no word without ="
        raise ConfigError(
            f"'{bare[len(places)]}' is a word too many: luthier {name} takes {takes}; an option is written "
            f"OPTION=VALUE, e.g. {bare[len(places)]}=VALUE"
        )
    named_too = [place for place in places[: len(values)] if any(w.startswith(f"{place}=") for w in words)]
    if named_too:
        raise ConfigError(f"{named_too[0]} is given twice: by name, and by a word without =")
    return [*(word for word in words if word not in bare), *map("{}={}".format, places, values)]
