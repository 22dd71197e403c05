"""The package wandb, and what a run is called there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import luthier


def client() -> Any:
    """Return the module wandb.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise luthier.ConfigError("tracker=wandb: wandb is not installed; pip install wandb") from error
    return wandb


def name_and_group(run_dir: Path) -> tuple[str, str | None]:
    """Return what the run in `run_dir` is called, and the group that it belongs to.

    The jobs of a multirun, which have ``status.json``, are a group that is called as their folder.
    """
    sweep = run_dir.parent.name if (run_dir / "status.json").exists() else None
    return f"{sweep}/{run_dir.name}" if sweep else run_dir.name, os.environ.get("WANDB_RUN_GROUP") or sweep
