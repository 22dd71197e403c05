"""Starting runs through Hydra: one in this process, or a multirun with a process for every job."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from luthier import config
from luthier.commands import cli
from luthier.commands.positionals import CommandLine
from luthier.errors import LuthierError, PluginError
from luthier.registry import catalogue, command
from luthier.runs import resumed_run

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
        composed = config.compose(verb, line.overrides, line.file, line.folders)
        if command(verb).single is None:
            composed.run_dir = str(Path(composed.run_dir).expanduser().absolute())
        run(verb, composed)
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


def _multirun(verb: str, line: CommandLine) -> int:
    jobs, words = _Jobs(verb), config.opened(verb, line.overrides, several=True)
    with config.session(verb, words, line.file, line.folders) as app:
        app.multirun(config.PRIMARY, jobs, words)
    if len(jobs.folders) > 1:
        catalogue().hooks.hook.after_multirun(runs=jobs.labelled())
    return 1 if jobs.failed else 0


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

    def __call__(self, composed: DictConfig) -> None:
        settings = HydraConfig.get()
        folder = Path(settings.runtime.output_dir)
        composed.run_dir = str(folder)
        self.folders.append((list(settings.overrides.task), folder))
        if self._in_own_process(composed) != 0:
            self.failed.append(folder)

    def labelled(self) -> list[tuple[str, Path]]:
        """Return, for every job, the overrides that not all jobs share, and its folder."""
        shared = set.intersection(*(set(overrides) for overrides, _ in self.folders))
        return [
            (" ".join(override.lstrip("+") for override in overrides if override not in shared), folder)
            for overrides, folder in self.folders
        ]

    def _in_own_process(self, composed: DictConfig) -> int:
        """Run a job in a process of its own: nothing of it — memory, seeds, hooks — reaches the next one."""
        plain: Any = OmegaConf.to_container(composed, resolve=True)
        context: Any = multiprocessing.get_context(START)
        context.set_forkserver_preload([PRELOADED])
        process = context.Process(target=cli.run_job, args=(self.verb, plain, dict(os.environ)))
        process.start()
        process.join()
        return int(process.exitcode)
