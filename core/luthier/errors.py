"""One small tree of errors that a person can cause; each is one line and ends the command, with status 2.

What they and the lines of the log quote, such as rows, paths and names, is shown by `visible`.
"""

import difflib
import logging
import re
from collections.abc import Iterable

LONGEST = 2000
"""Characters of a message, about a screenful."""
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
"""What moves a cursor, turns or hides text, or cannot be printed; line ends, tabs and joiners are not."""


def visible(text: str, longest: int = LONGEST) -> str:
    """Return `text` as a terminal may be given it: what cannot be seen escaped, cut in the middle if long."""
    text = _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text)
    half = longest // 2 - 25
    left = len(text) - 2 * half
    return text if len(text) <= longest else f"{text[:half]} … {left:,} characters left out … {text[-half:]}"


def _show(record: logging.LogRecord) -> bool:
    record.msg, record.args = visible(record.getMessage()), None
    return True


logging.getLogger("luthier").addFilter(_show)


class LuthierError(Exception):
    """What is wrong, where, what was expected, the way out — in one line, whatever is quoted in it.

    Attributes:
        status: Exit status of a command that ends with it.
    """

    status: int = 2

    def __init__(self, message: str) -> None:
        super().__init__(visible(" ".join(message.splitlines())))


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
        self.reason = visible(reason)


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
