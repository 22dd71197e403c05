"""Bounds for code that came with a checkpoint and may loop or grow without end: its chat template."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Iterator

SECONDS, GIBIBYTES = 20, 4
LONGEST = 10_000_000
"""Characters of a text that is encoded: tokenizers take ten seconds for that many."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Bound the time and, on Linux, the memory of a block, in the main thread; other threads have no alarm.

    Raises:
        TimeoutError: It takes longer than `SECONDS`.
        MemoryError: It takes more than `GIBIBYTES`.
    """
    if threading.current_thread() is not threading.main_thread() or sys.platform != "linux":
        yield
        return
    import resource

    pages = int(os.pread(_pages_file(os.getpid()), 32, 0).split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + GIBIBYTES * 2**30
    handler = signal.signal(signal.SIGALRM, _stop)
    timer = signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        if limits[0] == resource.RLIM_INFINITY or limits[0] > most:
            resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@functools.cache
def _pages_file(process: int) -> int:
    """Return an open file that says how many pages a process has; rendering asks for every row."""
    return os.open(f"/proc/{process}/statm", os.O_RDONLY)


def _stop(*_: object) -> None:
    raise TimeoutError(f"it takes longer than {SECONDS} seconds")
