"""Ctrl-C, SIGTERM and a closed terminal: a step is finished, a checkpoint saved, and the command ends."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from luthier.errors import LuthierError

log = logging.getLogger("luthier")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
    """Catch the first signal for the duration of the block; the same once more interrupts at once.

    Yields:
        A function that returns the number of the signal that came, or 0.
    """
    terminals = [stream for stream in (1, 2) if os.isatty(stream)]

    def stop(number: int, again: bool) -> None:
        if again:
            raise KeyboardInterrupt
        for stream in terminals:
            if not os.isatty(stream):  # it was closed, and writing to it would end the run unsaved
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        log.warning("the run stops after this step and saves a checkpoint; once more stops it at once")

    with _handled(stop) as came:
        yield lambda: came[0] if came else 0


def supervised(start: Callable[[], Any], wait: Callable[[Any], int]) -> tuple[int, int]:
    """Start a process and wait for its end; it is told of signals to stop, as SIGTERM.

    Returns:
        What `wait` does, and the number of the first signal that came, or 0.
    """
    process: Any = None

    def tell(*_: object) -> None:
        if process is not None and process.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)

    with _handled(tell) as came:
        process = start()
        if came:  # while it started
            tell()
        status = wait(process)
    return status, came[0] if came else 0


@contextlib.contextmanager
def _handled(act: Callable[[int, bool], None]) -> Iterator[list[int]]:
    """Call `act(number, again)` for the first signal, and where one comes again.

    A process may hear of one Ctrl-C twice: by the terminal, and by its parent as SIGTERM.
    """
    came: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        again = number in came
        came.append(number)
        if again or len(came) == 1:
            act(number, again)

    # Only the main thread can catch signals; what is ignored, as under nohup, stays so.
    main = threading.current_thread() is threading.main_thread()
    numbers = [n for n in SIGNALS if main and signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
