"""Tables on the terminal."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier_toolkits.terminal.tables import plain_console as plain_console, plain_table as plain_table
else:
    __getattr__, __dir__, __all__ = attach(__name__)
