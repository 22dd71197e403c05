"""Checkpoints: folders that are whole or not there, checked before they are believed.

``checkpoints/step-00000120/`` holds the trained weights, optimiser, schedule, position, random states,
config, plugin versions and a hash of every row, with a manifest of sizes and SHA-256. It is written beside
its place, flushed to disk and renamed. safetensors and JSON only: nothing that is loaded can run code.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from luthier.errors import LuthierError
from luthier.runs.folder import writing
from luthier.runs.state import Snapshot
from luthier.system import sha256_of, written_whole

log = logging.getLogger("luthier")
MANIFEST, STATE, CONFIG, LOCK = "manifest.json", "state.json", "config.yaml", "plugins.lock.json"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint that was found whole.

    Attributes:
        folder: Where it is.
        step: Optimiser steps it has behind it.
    """

    folder: Path
    step: int

    def load(self) -> Snapshot:
        """Read everything back."""
        tensors = {path.stem: load_file(path) for path in sorted(self.folder.glob("*.safetensors"))}
        return Snapshot(tensors, json.loads((self.folder / STATE).read_text(encoding="utf-8")))

    def config(self) -> str:
        """Return the run's config as YAML."""
        return (self.folder / CONFIG).read_text(encoding="utf-8")

    def lock(self) -> dict[str, str]:
        """Return the versions of the packages that made it."""
        versions: dict[str, str] = json.loads((self.folder / LOCK).read_text(encoding="utf-8"))
        return versions


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        root: Their folder.
        keep: How many of the newest stay.
    """

    root: Path
    keep: int = 2

    def folder(self, step: int) -> Path:
        """Return where the checkpoint of `step` stands."""
        return self.root / f"step-{step:08d}"

    def write(
        self, step: int, snapshot: Snapshot, config: str, lock: dict[str, str], best: int | None = None
    ) -> Path:
        """Write the checkpoint of `step` and remove old ones but `keep` of them, and the `best`.

        Raises:
            LuthierError: The disk is full or cannot be written; the earlier checkpoints are untouched.
        """
        folder = self.folder(step)
        left = f"that of step {kept[-1]} is kept" if (kept := self.steps()) else "there is none before it"
        with writing(folder, left):
            with written_whole(folder) as fresh:
                for name, tensors in snapshot.tensors.items():
                    save_file(tensors, fresh / f"{name}.safetensors")
                _write_text(fresh / STATE, json.dumps(snapshot.values))
                _write_text(fresh / CONFIG, config)
                _write_text(fresh / LOCK, json.dumps(lock, indent=2))
                files = sorted(path for path in fresh.iterdir())
                manifest = {
                    path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files
                }
                _write_text(fresh / MANIFEST, json.dumps(manifest, indent=2))
                for path in (*files, fresh / MANIFEST, fresh):
                    _flush(path)
            _flush(self.root)
        self.prune(step, best)
        return folder

    def steps(self) -> list[int]:
        """Return the steps that have a folder, ascending; none of them checked."""
        names = [path.name for path in self.root.glob("step-*")] if self.root.is_dir() else []
        return sorted(int(name[5:]) for name in names if name[5:].isdigit())

    def newest(self) -> Checkpoint | None:
        """Return the newest whole checkpoint; a damaged one is skipped with a warning."""
        for step in reversed(self.steps()):
            if fault := fault_of(self.folder(step)):
                log.warning("%s is damaged (%s): the checkpoint before it is used", self.folder(step), fault)
                continue
            return Checkpoint(self.folder(step), step)
        return None

    def at(self, step: int) -> Checkpoint:
        """Return the checkpoint of `step`.

        Raises:
            LuthierError: It is missing or damaged.
        """
        if fault := fault_of(self.folder(step)):
            raise LuthierError(
                f"{self.folder(step)}: the best checkpoint is damaged: {fault}; resume with "
                "evaluation.restore_best=false to keep the last weights"
            )
        return Checkpoint(self.folder(step), step)

    def prune(self, newest: int, best: int | None) -> None:
        """Remove all but the `best` and the `keep` up to `newest`: later ones are of a run that went back."""
        kept = [step for step in self.steps() if step <= newest][-self.keep :]
        for step in self.steps():
            if step not in kept and step != best:
                shutil.rmtree(self.folder(step), ignore_errors=True)


def fault_of(folder: Path) -> str:
    """Return what is wrong with a checkpoint folder, or an empty string: every byte is compared."""
    try:
        manifest: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            path = folder / name
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes, expected {expected['bytes']:,}"
            if sha256_of(path) != expected["sha256"]:
                return f"{name} is not what was written (SHA-256 differs)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return "" if STATE in manifest else f"{MANIFEST} is not whole"


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
