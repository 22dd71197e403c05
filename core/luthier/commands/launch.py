"""Starting runs through Hydra: one in this process, or a multirun with a process for every job."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from safetensors import SafetensorError

from luthier import config
from luthier.commands import cli
from luthier.commands.positionals import CommandLine
from luthier.errors import LuthierError, PluginError
from luthier.registry import catalogue, command
from luthier.runs import claimed, resumed_run, supervised, write_status

# The server's socket is in the folder for temporary files, and its path has room for some hundred characters.
START = "forkserver" if sys.platform == "linux" and len(os.fsencode(tempfile.gettempdir())) < 60 else "spawn"
PRELOADED = "luthier.commands.preparation"
"""Imported once for all jobs. It must leave the GPU alone: whoever is forked later could not use it."""


def launch(verb: str, line: CommandLine) -> int:
    """Compose `verb` as the command line says and run it; ``-m`` runs every combination.

    Returns:
        The exit status: 0, or 1 if a job of a multirun failed.

    Raises:
        LuthierError: The config cannot be composed, or a single run ended with an error.
    """
    config.prepare()
    _check_flags(line)
    with config.in_one_line(verb, line.file):
        if line.multirun:
            return _multirun(verb, line)
        if line.shows:
            _show(verb, line)
            return 0
        run(verb, config.compose(verb, line.overrides, line.file, line.folders))
    return 0


def run(verb: str, composed: DictConfig) -> None:
    """Run `verb` in this process.

    Raises:
        LuthierError: It ended with an error, or something in it ended the program.
    """
    try:
        command(verb).run(composed)
    except SystemExit as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise PluginError(
            f"{verb} was ended before it was done, by {where.filename}:{where.lineno}"
        ) from error
    except SafetensorError as error:
        raise LuthierError(f"a file of weights cannot be read or written: {error}") from error


def _multirun(verb: str, line: CommandLine) -> int:
    jobs, words = _Jobs(verb), config.opened(verb, line.overrides, several=True)
    with contextlib.ExitStack() as held, config.session(verb, words, line.file, line.folders) as app:
        composed = app.compose_config(config.PRIMARY, words, RunMode.MULTIRUN)
        _claim(composed, held)
        plugins, context = Plugins.instance(), HydraContext(app.config_loader, Callbacks())
        sweeper = plugins.instantiate_sweeper(config=composed, hydra_context=context, task_function=jobs)
        sweeper.sweep(list(composed.hydra.overrides.task))
    if jobs.error:
        raise jobs.error
    if not jobs.folders:
        raise LuthierError(f"-m has nothing to run: no value in {' '.join(line.overrides)}")
    if len(jobs.folders) > 1:
        catalogue().hooks.hook.after_multirun(runs=jobs.labelled())
    return 1 if jobs.failed else 0


def _claim(composed: DictConfig, held: contextlib.ExitStack) -> None:
    """Hold the folder of a multirun until it ends, before Hydra writes to it."""
    raw: Any = OmegaConf.to_container(composed)
    spelt = str(raw["hydra"]["sweep"]["dir"]).replace("${run_dir}", str(raw["run_dir"]))
    folder = claimed(str(composed.hydra.sweep.dir), spelt, held)
    with read_write(composed.hydra), open_dict(composed.hydra):
        composed.hydra.sweep.dir = folder
        # Every job is composed anew, from these.
        composed.hydra.overrides.hydra.append(f"hydra.sweep.dir={config.quoted(folder)}")


def _show(verb: str, line: CommandLine) -> None:
    """Print the composed config."""
    words = config.opened(verb, line.overrides)
    with config.session(verb, words, line.file, line.folders) as app:
        app.show_cfg(config.PRIMARY, words, line.shows or "job", line.package, line.resolve)


def _check_flags(line: CommandLine) -> None:
    """Refuse a multirun, or a look at the config, of what is not a new run of one process.

    Raises:
        LuthierError: It is asked for.
    """
    resumed = resumed_run(line.overrides)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    flag = "-m starts new runs one after the other and" if line.multirun else "--cfg" if line.shows else ""
    if flag and (resumed or several):
        what = "resume=FOLDER" if resumed else "accelerate launch"
        raise LuthierError(f"{flag} cannot be combined with {what}")


class _Jobs:
    """The task function Hydra calls once a job; remembers the run folders and which failed."""

    def __init__(self, verb: str) -> None:
        self.verb = verb
        self.folders: list[tuple[list[str], Path]] = []
        self.failed: list[Path] = []
        self.error: LuthierError | None = None

    def __call__(self, composed: DictConfig) -> None:
        """Run a job, its status in its folder; those after an error are left out.

        Hydra would print its own lines about an error, so it is kept.
        """
        try:
            with config.in_one_line(self.verb):
                self._job(composed)
        except LuthierError as error:
            self.error = self.error or error

    def _job(self, composed: DictConfig) -> None:
        settings = HydraConfig.get()
        folder, overrides = Path(settings.runtime.output_dir), list(settings.overrides.task)
        if self.error:
            return
        if folder in (earlier for _, earlier in self.folders):
            raise LuthierError(f"{folder} would be that of two runs; hydra.sweep.subdir must differ")
        composed.run_dir = str(folder)
        self.folders.append((overrides, folder))
        write_status(folder, overrides, "running")  # what an earlier multirun left is not this one's
        if self._in_own_process(composed, overrides) != 0:
            self.failed.append(folder)

    def labelled(self) -> list[tuple[str, Path]]:
        """Return, for every job, the overrides that not all jobs share, and its folder."""
        shared = set.intersection(*(set(overrides) for overrides, _ in self.folders))
        return [
            (" ".join(override.lstrip("+") for override in overrides if override not in shared), folder)
            for overrides, folder in self.folders
        ]

    def _in_own_process(self, composed: DictConfig, overrides: list[str]) -> int:
        """Run a job in a process of its own: nothing of it — memory, seeds, hooks — reaches the next one."""
        plain: Any = OmegaConf.to_container(composed, resolve=True)
        context: Any = multiprocessing.get_context(START)
        context.set_forkserver_preload([PRELOADED])
        process = context.Process(target=cli.run_job, args=(self.verb, plain, overrides, dict(os.environ)))
        status, stopped = supervised(
            lambda: process.start() or process, lambda own: own.join() or own.exitcode
        )
        if stopped:
            what = f"stopped by {signal.Signals(stopped).name} in job {len(self.folders) - 1} of the multirun"
            self.error = LuthierError(f"{what}; those after it were not begun. Repeat it with resume=auto")
            self.error.status = 128 + stopped
        return status
