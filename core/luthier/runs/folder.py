"""The run folder: opened for a new or a resumed run, trackers registered, errors reported."""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError

from luthier import config as configs
from luthier.errors import ConfigError, LuthierError
from luthier.registry import catalogue
from luthier.system import Processes, locked

SUMMARY = "summary.json"
MEASURED = ("metrics.jsonl", "evaluations.jsonl", "checkpoints", "model")
"""What only a run that trained, measured or merged something leaves."""


class Silent:
    """Stands for the lifecycle hooks in processes that do not speak."""

    def __getattr__(self, name: str) -> Any:
        return lambda **_: None


def hooks(processes: Processes) -> Any:
    """Return what calls the lifecycle hooks: those of the plugins in the main process, silence elsewhere."""
    return catalogue().hooks.hook if processes.main else Silent()


@contextlib.contextmanager
def run_folder(config: DictConfig, processes: Processes) -> Iterator[Path]:
    """Open the run folder, register the configured trackers for the block, report what ends it.

    Raises:
        ConfigError: The folder holds a run that is not resumed, or cannot be written.
    """
    with contextlib.ExitStack() as held:
        if processes.main:
            raw: Any = OmegaConf.to_container(config)
            config.run_dir = claimed(str(config.run_dir), str(raw["run_dir"]), held)
        config.run_dir = processes.same(config.run_dir)
        yield from _opened(config, Path(config.run_dir), processes)


def _opened(config: DictConfig, run_dir: Path, processes: Processes) -> Iterator[Path]:
    resuming = bool(config.get("resume")) and (run_dir / "config.yaml").exists()
    if processes.same(_holds_a_run(run_dir) and not resuming):
        raise ConfigError(
            f"run_dir={config.run_dir} holds a run or a model already; choose another folder, or go on "
            "with it: resume=auto"
        )
    trackers = []
    if processes.main:
        for place in (run_dir, run_dir / "checkpoints"):
            remove_leftovers(place)
        if not resuming:  # a resumed run's is written once it is known to be the same run
            write_config(config, run_dir)
        trackers = [configs.build("tracker", node) for node in (config.get("trackers") or {}).values()]
    registry = catalogue().hooks
    for tracker in trackers:
        registry.register(tracker)
    hook = hooks(processes)
    try:
        hook.after_config_composed(config=config)
        yield run_dir
    except BaseException as error:
        hook.on_train_error(error=error)
        if processes.main and not resuming:
            _clear(run_dir)
        raise
    finally:
        for tracker in trackers:
            registry.unregister(tracker)


def claimed(named: str, spelt: str, held: contextlib.ExitStack) -> str:
    """Make the folder `named`, hold it, and return it: two runs in one would replace each other's results.

    Where it is `spelt` with the clock, and a run of the same second has it, it gets a number.

    Raises:
        ConfigError: It is in use, or cannot be written.
    """
    by_clock = "${now" in spelt
    wanted = Path(named).expanduser()
    run_dir = wanted if by_clock else wanted.absolute()
    if not named.strip():
        raise ConfigError("run_dir= names no folder: run_dir=FOLDER")
    numbers = itertools.count(2)
    while not _locks(run_dir, held) or (by_clock and _holds_a_run(run_dir)):
        if not by_clock:
            raise ConfigError(
                f"run_dir={run_dir} is in use by a run that has not ended; wait for it, or choose another"
            )
        run_dir = wanted.with_name(f"{wanted.name}-{next(numbers)}")
    return str(run_dir)


def _locks(run_dir: Path, held: contextlib.ExitStack) -> bool:
    """Make and hold a folder, unless another process holds it; return whether."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(run_dir))
    except BlockingIOError:
        return False
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir} cannot be written: {error.strerror}") from error
    return True


def _holds_a_run(run_dir: Path) -> bool:
    return any((run_dir / name).exists() for name in ("config.yaml", "model", "multirun.yaml"))


def remove_leftovers(place: Path, name: str = "") -> None:
    """Remove what killed processes were writing to `name` in `place`, or to any; what lives stays."""
    for leftover in place.glob(f".*{glob.escape(name)}.{'[0-9a-f]' * 8}.*"):
        with contextlib.suppress(OSError), locked(leftover) as dead:
            if dead:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


@contextlib.contextmanager
def writing(what: Path, left: str) -> Iterator[None]:
    """Raise what is said of writing `what`, such as of a full disk, as one line that says what is `left`.

    Raises:
        LuthierError: It cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise LuthierError(f"{what} cannot be written: {said}; {left}") from error


def finished(run_dir: Path) -> dict[str, Any] | None:
    """Return the summary of a run that ended, or None."""
    try:
        summary: dict[str, Any] = json.loads((run_dir / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary


def write_config(config: DictConfig, run_dir: Path) -> None:
    """Write ``config.yaml``.

    Raises:
        LuthierError: It cannot be written.
    """
    with writing(run_dir / "config.yaml", "make room, or choose another run_dir"):
        draft = run_dir / "config.yaml.part"  # a kill must not leave half a config
        OmegaConf.save(config, draft, resolve=True)
        draft.replace(run_dir / "config.yaml")


def _clear(run_dir: Path) -> None:
    """Leave no folder of a run that measured nothing, so that the mended command can use its name."""
    measured = any((run_dir / name).exists() for name in MEASURED)
    if not measured and not any(run_dir.glob("reference-*.safetensors")):
        (run_dir / "config.yaml").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            run_dir.rmdir()
