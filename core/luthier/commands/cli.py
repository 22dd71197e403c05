"""The command line: ``luthier COMMAND [overrides]``. The only place that reads ``sys.argv``."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from luthier import registry
from luthier.commands.positionals import parsed
from luthier.errors import LuthierError

HELP = ("-h", "--help")


def main(argv: list[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 a run of a multirun failed, 2 something a person can mend."""
    arguments = sys.argv[1:] if argv is None else argv
    if sys.stdout is None:  # closed, as by `>&-`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.exit(report(lambda: dispatch(arguments)))


def report(action: Callable[[], int]) -> int:
    """Call `action`; an error a person can cause becomes one line on stderr and its exit status, mostly 2."""
    try:
        return action()
    except LuthierError as error:
        if os.environ.get("LUTHIER_TRACEBACK"):
            raise
        print(f"luthier: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("luthier: interrupted", file=sys.stderr)
        return 130


def dispatch(arguments: list[str]) -> int:
    """Run the command that `arguments` begin with and return the exit status."""
    name, *words = arguments or ["help"]
    if "--version" in arguments:
        from importlib.metadata import version

        print(f"luthier {version('luthier')}")
        return 0
    asks = [word for word in (name, *words) if word not in HELP]
    return _run("help", asks) if asks != [name, *words] and _composed(name) else _run(name, words)


def _composed(name: str) -> bool:
    """Whether `name` is no command with a help of its own."""
    return name in HELP or registry.command(name).composed


def _run(name: str, words: list[str]) -> int:
    quieten()
    # Importing torch takes a second or two, so the commands that need it import it here. Nothing of it is
    # garbage, and looking for some would take another one.
    gc.disable()
    with _interrupted_afterwards():
        chosen = registry.command(name)
        if chosen.composed:
            from luthier import config
            from luthier.commands.launch import launch

            config.prepare()
    gc.freeze()
    gc.enable()
    if not chosen.composed:
        return int(chosen.run(words) or 0)
    line = parsed(name, chosen, words)
    if line.multirun and (reason := chosen.single):
        raise LuthierError(f"{name} {reason}; leave out -m and give one value each")
    return launch(name, line)


@contextlib.contextmanager
def _interrupted_afterwards() -> Iterator[None]:
    """Hold Ctrl-C back while modules are imported, as some swallow it and the program goes on.

    Pressed once more, it counts at once.
    """
    theirs = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    if theirs or threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = threading.Event()

    def hold(*_: object) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed.is_set():
        raise KeyboardInterrupt


def run_job(verb: str, plain: dict[str, Any], overrides: list[str], environment: dict[str, str]) -> None:
    """Run one composed job of a multirun in this process, which is its own, and exit as `main` does."""
    os.environ.update(environment)  # what it was forked from has that of the first job
    quieten()
    from omegaconf import OmegaConf

    from luthier import config
    from luthier.commands.launch import run
    from luthier.runs import job_status

    config.prepare()

    def job() -> int:
        composed = OmegaConf.create(plain)
        with config.in_one_line(verb), job_status(Path(composed.run_dir), overrides):
            config.validate(verb, composed)
            run(verb, composed)
        return 0

    sys.exit(report(job))


def quieten() -> None:
    """Keep one library from warning, whenever it is imported, of a kernel that nothing asked for."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
