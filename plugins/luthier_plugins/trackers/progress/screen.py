"""A terminal with at most one progress bar, for trackers."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from luthier_toolkits.terminal import SafeConsole


@dataclass
class Screen:
    """Where a tracker prints; on a terminal it may show a bar.

    Attributes:
        console: Of rich.
        bar: The bar that is shown, or None.
    """

    console: Console = field(default_factory=SafeConsole)
    bar: Progress | None = None

    def start(self, title: str, total: int, done: int = 0, transient: bool = False) -> None:
        """Show a bar on a terminal; elsewhere nothing."""
        if not self.console.is_terminal:
            return
        self.bar = Progress(
            TextColumn(f"[bold]{title}[/]"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=transient,
        )
        self.bar.add_task("", total=total, completed=done)
        self.bar.start()

    def move(self, done: int, text: str = "") -> bool:
        """Move the bar and write `text` beside it; return whether there is one."""
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=done, description=text)
        return self.bar is not None

    @property
    def full(self) -> bool:
        """Whether the bar has come to its end."""
        return self.bar is not None and self.bar.finished

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self.bar:
            self.bar.stop()
        self.bar = None
