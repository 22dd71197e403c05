"""Text of rows, paths and names on the terminal: as it is, not as what it would do there."""

from __future__ import annotations

import os
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from luthier.errors import visible


def shown(text: object) -> str:
    """Return text that others wrote for a line or cell with markup: brackets stay, no cursor is moved."""
    return escape(visible(str(text)))


def counted(count: int, what: str) -> str:
    """Return a count with its noun, of which `what` is the singular."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


class SafeConsole(Console):
    """A console that passes nothing on to the terminal but text, lines, and the styles it was given."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"highlight": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a string: of a line, or of a cell of a table."""
        return super().render_str(visible(text, sys.maxsize), **options)  # a cut would part markup

    def on_broken_pipe(self) -> None:
        """Say no more where nobody reads on, as after `| head`; what is run goes on to its end."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
