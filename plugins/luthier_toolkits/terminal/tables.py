"""Tables without frames, whole in a file or a pipe."""

from rich import box
from rich.console import Console
from rich.table import Table


def plain_table(*columns: str) -> Table:
    """Return a table without frame that folds its cells."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def plain_console() -> Console:
    """Return a console that folds lines to a terminal's width, and in a file or pipe to none."""
    console = Console()
    return console if console.is_terminal else Console(width=200)
