"""Bare words of a command line, written as the overrides that they stand for."""

from __future__ import annotations

import re
from collections.abc import Sequence

from luthier.contracts import Command
from luthier.errors import ConfigError

_PLAIN = re.compile(r"[\w./:~@%+-]+")
"""What Hydra reads as text without quotes."""


def named(name: str, command: Command, words: Sequence[str]) -> list[str]:
    """Return `words` with the bare ones given the names that the command's `positionals` say.

    Args:
        name: The command's name.
        command: What `positionals` belong to.
        words: Overrides, flags and bare words, in the order in which they were typed.

    Raises:
        ConfigError: There are more bare words than the command takes.
    """
    bare = [word for word in words if not word.startswith(("-", "+", "~")) and "=" not in word]
    places = [place for place in command.positionals if isinstance(place, str)]
    values = [_quoted(word) for word in bare]
    if ... in command.positionals and len(values) >= len(places):
        single = len(places) - 1
        values = [*values[:single], f"[{','.join(values[single:])}]"]
    if len(values) > len(places):
        takes = " ".join(place.rpartition(".")[2].upper() for place in places) or "none"
        raise ConfigError(
            f"'{bare[len(places)]}' is a word too many: luthier {name} takes {takes}; an option is written "
            f"OPTION=VALUE, e.g. {bare[len(places)]}=VALUE"
        )
    return [*(word for word in words if word not in bare), *map("{}={}".format, places, values)]


def _quoted(word: str) -> str:
    """Return `word` as Hydra's grammar reads it as one text."""
    return word if _PLAIN.fullmatch(word) else "'" + word.replace("\\", "\\\\").replace("'", "\\'") + "'"
