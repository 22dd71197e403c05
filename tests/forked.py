"""Luthier's command line in processes of their own, forked from one that has imported torch and transformers.

They differ from ``python -m luthier`` in what the interpreter does before `main`: tests about imports and
start-up use a real one.
"""

import contextlib
import functools
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

HERE = Path(__file__).parent


class Command:
    """A command line that is running; the part of `subprocess.Popen` that tests use."""

    def __init__(
        self,
        arguments: Sequence[str],
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        module: str = "luthier.commands.cli",
    ) -> None:
        with contextlib.ExitStack() as opened:
            self.files = [opened.enter_context(tempfile.NamedTemporaryFile(delete=False)) for _ in range(2)]
        out, err = (file.name for file in self.files)
        environment = dict(os.environ if env is None else env)
        where = str(cwd or Path.cwd())
        given = module, list(arguments), where, environment, out, err
        self.process = _context().Process(target=_run, args=given)
        self.process.start()
        self.arguments, self.pid = list(arguments), self.process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status; None while it runs."""
        return self.process.exitcode

    poll = returncode.fget

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """Wait for its end and return what it printed, to stdout and stderr."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.arguments, timeout)
        texts = tuple(Path(file.name).read_text() for file in self.files)
        for file in self.files:
            Path(file.name).unlink()
        return texts


def luthier(
    *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``luthier ARGUMENTS`` to its end."""
    command = Command(arguments, cwd, env)
    out, err = command.communicate()
    return subprocess.CompletedProcess(arguments, command.returncode, out, err)


@functools.cache
def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *([before] if before else [])])
    kept, folder = (os.dup(1), os.dup(2)), tempfile.tempdir
    # The server's socket is there, and its path has room for some hundred characters.
    tempfile.tempdir = "/tmp"
    try:
        # What has no files of its own, as jobs of a multirun, would write between the lines of pytest.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        forkserver.ensure_running()
    finally:
        tempfile.tempdir = folder
        for stream, own in enumerate(kept, 1):
            os.dup2(own, stream)
            os.close(own)
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def _run(
    module: str, arguments: list[str], cwd: str, environment: dict[str, str], out: str, err: str
) -> None:
    for name, stream in ((out, 1), (err, 2)):
        target = os.open(name, os.O_WRONLY | os.O_TRUNC)
        os.dup2(target, stream)
        os.close(target)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    # Where the parent ignores it, as under nohup, a child does too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    sys.argv = ["luthier", *arguments]
    # Jobs of a multirun are forked from what this process was forked from.
    forkserver._forkserver.ensure_running = lambda: None
    sys.exit(importlib.import_module(module).main())
