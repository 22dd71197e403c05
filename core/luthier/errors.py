"""One small tree of errors that a person can cause; each is one line and ends the command, with status 2."""

import difflib
from collections.abc import Iterable


class LuthierError(Exception):
    """What is wrong, where, what was expected, the way out — in one line, whatever is quoted in it.

    Attributes:
        status: Exit status of a command that ends with it.
    """

    status: int = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class ConfigError(LuthierError, ValueError):
    """A composed configuration that cannot be run."""


class GuardError(LuthierError):
    """A run that should not go on, and whose weights are kept as they are."""


class DataError(LuthierError, ValueError):
    """A row, file or source that cannot be trained on."""


class UnusableRowError(DataError):
    """A well-formed row that nothing can be learned from, such as a pair of equal completions.

    Attributes:
        reason: Why, without the row's origin: such rows are counted by it.
    """

    def __init__(self, origin: str, reason: str) -> None:
        super().__init__(f"{origin}: {reason}; drop the row, or choose unusable=drop")
        self.reason = reason


class ModelError(LuthierError, ValueError):
    """A checkpoint, tokenizer or architecture that cannot be used."""


class PluginError(LuthierError, RuntimeError):
    """A plugin that is broken, missing, or registered twice."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"did you mean 'x'? "`` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'? " if close else ""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Return the message for a name that is not among the `known` ones."""
    names = sorted(known)
    return f"unknown {what} '{name}': {nearest(name, names)}known: {', '.join(names) or 'none'}"
