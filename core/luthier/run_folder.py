"""The run folder: opened for a new or a resumed run, trackers registered, errors reported."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from luthier import config as configs
from luthier.catalogue import catalogue
from luthier.errors import ConfigError
from luthier.parallel import Processes

MEASURED = ("metrics.jsonl", "evaluations.jsonl", "checkpoints")
"""What only a run that trained or measured something leaves."""


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
    config.run_dir = processes.same(config.run_dir)
    run_dir = Path(config.run_dir)
    resuming = bool(config.get("resume"))
    held = [name for name in ("config.yaml", "model") if (run_dir / name).exists()]
    if processes.same(not config.run_dir or (bool(held) and not resuming)):
        raise ConfigError(
            f"run_dir={config.run_dir} holds a run or a model already; choose another folder, or continue "
            f"that run with resume={config.run_dir}"
        )
    trackers = []
    if processes.main:
        if not (resuming and held):  # a resumed run's is written once it is known to be the same run
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


def finished(run_dir: Path) -> dict[str, Any] | None:
    """Return the summary of a run that ended, or None."""
    try:
        summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary


def write_config(config: DictConfig, run_dir: Path) -> None:
    """Write ``config.yaml``.

    Raises:
        ConfigError: The folder cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, run_dir / "config.yaml", resolve=True)
    except OSError as error:
        raise ConfigError(f"run_dir={config.run_dir} cannot be written: {error.strerror}") from error


def _clear(run_dir: Path) -> None:
    """Leave no folder of a run that measured nothing, so that the mended command can use its name."""
    if not any((run_dir / name).exists() for name in MEASURED):
        (run_dir / "config.yaml").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            run_dir.rmdir()
