"""Tables without frames, whole in a file or a pipe."""

from rich import box
from rich.table import Table

from luthier_toolkits.terminal.text import SafeConsole


def plain_table(*columns: str) -> Table:
    """Return a table without frame that folds its cells."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def plain_console() -> SafeConsole:
    """Return a console that folds lines to a terminal's width, and in a file or pipe to none."""
    console = SafeConsole()
    return console if console.is_terminal else SafeConsole(width=200)
