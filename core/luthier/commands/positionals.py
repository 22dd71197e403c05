"""Bare words and flags of a command line, written as Hydra reads them wherever they stand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from luthier.errors import ConfigError

if TYPE_CHECKING:
    from luthier.contracts import Command

_VALUED = ("--cfg", "--config-dir", "--package")
_FLAG = re.compile(r"-m|--multirun|--resolve|--cfg=(job|hydra|all)|--(config-dir|package)=.+")
"""Hydra's flags."""


def named(name: str, command: Command, words: Sequence[str]) -> list[str]:
    """Return `words` with the bare ones given the names that the command's `positionals` say.

    Args:
        name: The command's name.
        command: What `positionals` belong to.
        words: Overrides, flags and bare words, in the order in which they were typed.

    Raises:
        ConfigError: A flag is unknown or lacks its value; the command takes fewer bare words; one of them
            fills an option that is given by name too.
    """
    flags, words = _flags(words)
    bare = [word for word in words if not word.startswith(("+", "~")) and "=" not in word]
    places = [place for place in command.positionals if isinstance(place, str)]
    values = [_quoted(word) for word in bare]
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
    return [*flags, *(word for word in words if word not in bare), *map("{}={}".format, places, values)]


def _flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the flags among `words`, each with its value (``--cfg=job``), and the others.

    Hydra's parser takes no flag between overrides.
    """
    flags: list[str] = []
    others, rest = [], iter(words)
    for word in rest:
        if not word.startswith("-"):
            others.append(word)
            continue
        flags.append(f"{word}={next(rest, '')}" if word in _VALUED else word)
        if not _FLAG.fullmatch(flags[-1]):
            known = "-m, --resolve, --cfg=job, --config-dir=FOLDER, --package=NAME"
            raise ConfigError(f"'{flags[-1]}' is no flag, or lacks its value; known: {known}")
    return flags, others


def _quoted(word: str) -> str:
    """Return `word` as Hydra's grammar reads it as text: backslashes count before quotes alone."""
    return "'" + re.sub(r"(\\*)('|$)", lambda end: end[1] * 2 + ("\\'" if end[2] else ""), word) + "'"
