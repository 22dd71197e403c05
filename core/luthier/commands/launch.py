"""Starting runs through Hydra: one in this process, or a multirun with a process for every job."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError

from luthier import config
from luthier.commands import cli
from luthier.errors import LuthierError
from luthier.registry import catalogue, command
from luthier.runs import resumed_run, supervised, write_status
from luthier.system import locked

# The server's socket is in the folder for temporary files, and its path has room for some hundred characters.
START = "forkserver" if sys.platform == "linux" and len(os.fsencode(tempfile.gettempdir())) < 60 else "spawn"
PRELOADED = "luthier.commands.preparation"
"""Imported once for all jobs. It must leave the GPU alone: whoever is forked later could not use it."""


def launch(verb: str, overrides: list[str]) -> int:
    """Compose `verb` with `overrides` and run it; ``-m`` runs every combination.

    Returns:
        The exit status: 0, or 1 if a job of a multirun failed.

    Raises:
        LuthierError: The config cannot be composed, or a single run ended with an error.
    """
    config.prepare()
    if _beside_hydra(overrides):
        with in_one_line(verb):
            command(verb).run(config.compose(verb, overrides))
        return 0
    # Hydra would print its own, longer account of an error and exit with status 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    jobs = _Jobs(verb)
    entry = hydra.main(version_base=config.VERSION_BASE, config_path=config.CONFIG_PATH, config_name=verb)
    before, sys.argv = sys.argv, [f"luthier {verb}", *config.opened(overrides)]
    OmegaConf.register_new_resolver("sweep_folder", _sweep_folder, use_cache=True, replace=True)
    try:
        with jobs.held, in_one_line(verb):
            entry(jobs)()
    finally:
        sys.argv = before
    if jobs.error:
        raise jobs.error
    if len(jobs.folders) > 1:
        catalogue().hooks.hook.after_multirun(runs=jobs.labelled())
    return 1 if jobs.failed else 0


@contextlib.contextmanager
def in_one_line(verb: str) -> Iterator[None]:
    """Raise what Hydra says of a config, or the system of a file, as one line."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:  # a choice that is not there is an OSError too
        raise config.explain(error, config.known_keys(verb)) from error
    except OSError as error:
        raise LuthierError(f"{error.filename or 'a file'}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise LuthierError(f"a file of weights cannot be read or written: {error}") from error


def _beside_hydra(overrides: list[str]) -> bool:
    """Whether there is a run folder already, which Hydra would make: the main process's, or a resumed run's.

    Raises:
        LuthierError: A multirun of such runs, or another flag of Hydra's.
    """
    resumed = resumed_run(overrides)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if (resumed or several) and (flags := [word for word in overrides if word.startswith("-")]):
        what = "resume=FOLDER" if resumed else "accelerate launch"
        why = "starts new runs one after the other and " if flags[0] in ("-m", "--multirun") else ""
        raise LuthierError(f"{flags[0]} {why}cannot be combined with {what}")
    return bool(resumed) or int(os.environ.get("RANK", "0")) > 0


def _sweep_folder(named: str) -> str:
    """Make the folder of a multirun, with a number where one of the same second has that name."""
    for number in itertools.count(1):
        folder = Path(named if number == 1 else f"{named}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return str(folder)


class _Jobs:
    """The task function Hydra calls once a job; remembers the run folders and which failed."""

    def __init__(self, verb: str) -> None:
        self.verb = verb
        self.folders: list[tuple[list[str], Path]] = []
        self.failed: list[Path] = []
        self.error: LuthierError | None = None
        self.held = contextlib.ExitStack()

    def __call__(self, composed: DictConfig) -> None:
        """Run a job; Hydra would print its own lines about an error, so it is kept."""
        folder = Path(HydraConfig.get().runtime.output_dir)
        run = self._job if HydraConfig.get().mode == RunMode.MULTIRUN else self._here
        try:
            with in_one_line(self.verb):
                run(composed, folder)
        except LuthierError as error:
            self.error = error

    def labelled(self) -> list[tuple[str, Path]]:
        """Return, for every job, the overrides that not all jobs share, and its folder."""
        shared = set.intersection(*(set(overrides) for overrides, _ in self.folders))
        return [
            (" ".join(override.lstrip("+") for override in overrides if override not in shared), folder)
            for overrides, folder in self.folders
        ]

    def _here(self, composed: DictConfig, folder: Path) -> None:
        """Run the only job in this process."""
        config.validate(self.verb, composed)
        if command(self.verb).single is None and Path(composed.run_dir).absolute() != folder:
            composed.run_dir = str(folder)
        command(self.verb).run(composed)

    def _job(self, composed: DictConfig, folder: Path) -> None:
        """Run one of several jobs, its status in its folder; those after an error are left out."""
        settings = HydraConfig.get()
        overrides = list(settings.overrides.task)
        if self.error:
            return
        if not self.folders:
            self._hold(Path(settings.sweep.dir))
        composed.run_dir = str(folder)
        self.folders.append((overrides, folder))
        write_status(folder, overrides, "running")  # what an earlier multirun left is not this one's
        if self._in_own_process(composed, overrides) != 0:
            self.failed.append(folder)

    def _hold(self, sweep: Path) -> None:
        """Hold the folder of the multirun until it ends."""
        try:
            self.held.enter_context(locked(sweep))
        except BlockingIOError as error:
            raise LuthierError(
                f"{sweep} is in use by a multirun that has not ended; choose another"
            ) from error

    def _in_own_process(self, composed: DictConfig, overrides: list[str]) -> int:
        """Run a job in a process of its own: nothing of it — memory, seeds, hooks — reaches the next one."""
        plain: Any = OmegaConf.to_container(composed, resolve=True)
        context: Any = multiprocessing.get_context(START)
        context.set_forkserver_preload([PRELOADED])
        process = context.Process(target=cli.run_job, args=(self.verb, plain, overrides, dict(os.environ)))

        def start() -> Any:
            process.start()
            return process

        def wait(process: Any) -> int:
            process.join()
            return int(process.exitcode)

        status, stopped = supervised(start, wait)
        if stopped:
            what = f"stopped by {signal.Signals(stopped).name} in job {len(self.folders) - 1} of the multirun"
            self.error = LuthierError(f"{what}; those after it were not begun. Repeat it with resume=auto")
            self.error.status = 128 + stopped
        return status
