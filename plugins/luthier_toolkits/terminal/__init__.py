"""Tables and text on the terminal."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier_toolkits.terminal.tables import plain_console as plain_console, plain_table as plain_table
    from luthier_toolkits.terminal.text import (
        SafeConsole as SafeConsole,
        counted as counted,
        shown as shown,
    )
else:
    __getattr__, __dir__, __all__ = attach(__name__)
