"""Ctrl-C and SIGTERM while training: the step is finished, a checkpoint saved, and the command ends."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from luthier.errors import LuthierError

log = logging.getLogger("luthier")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedError(LuthierError):
    """A run that was told to stop and saved a checkpoint; its exit status is the shell's for signals."""

    def __init__(self, number: int, step: int, run_dir: Path) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        super().__init__(
            f"stopped by {name} after step {step}; a checkpoint is saved, "
            f"go on with: luthier train resume={run_dir}"
        )
        self.status = 128 + number


@contextlib.contextmanager
def caught() -> Iterator[Callable[[], int]]:
    """Catch the first signal for the duration of the block; a second one interrupts at once.

    Yields:
        A function that returns the number of the signal that came, or 0.
    """
    came = 0

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = number
        log.warning("the run stops after this step and saves a checkpoint; once more stops it at once")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0  # only the main thread can catch signals
        return
    before = {number: signal.signal(number, remember) for number in SIGNALS}
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
