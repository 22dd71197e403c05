"""What a job of a multirun says of itself on disk: what it was, and how it ended."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from luthier.runs.report import write_json

STATUS = "status.json"
"""In the folder of a job: its overrides, its state (running, done or failed), and the error that ended it."""


@contextlib.contextmanager
def job_status(folder: Path, overrides: Sequence[str]) -> Iterator[None]:
    """Say in `folder` that a job runs and how it ended; one that is killed is running for ever.

    Where the multirun that began it is killed, the job is told to stop, as by SIGTERM.
    """
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_stop_after, args=(parent,), daemon=True).start()
    write_status(folder, overrides, "running")
    try:
        yield
    except BaseException as error:
        write_status(folder, overrides, "failed", str(error) or type(error).__name__)
        raise
    write_status(folder, overrides, "done")


def _stop_after(parent: Any) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def write_status(folder: Path, overrides: Sequence[str], state: str, error: str | None = None) -> None:
    """Write ``status.json``; what an earlier multirun left there is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / STATUS, {"overrides": list(overrides), "state": state, "error": error})
