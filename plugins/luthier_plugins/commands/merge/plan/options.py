"""The options of a merge, checked, and the models that they name, opened."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from luthier.contracts import Merger
from luthier.errors import ConfigError, unknown
from luthier.system import DTYPES
from luthier_plugins.commands.merge.io.hashes import hashing
from luthier_plugins.commands.merge.io.inputs import BASE, MergeInput, labelled, open_input
from luthier_plugins.commands.merge.plan.tensors import MISSING
from luthier_plugins.commands.merge.report.check import CHECKS

RESULTS = ("model", "adapter")


def check_options(config: DictConfig) -> None:
    """Refuse options that mean nothing.

    Raises:
        ConfigError: One does.
    """
    if OmegaConf.is_missing(config, "models"):
        raise ConfigError("models must be set: '[FOLDER, FOLDER]' or '{one: FOLDER, two: FOLDER}'")
    for key, known in (
        ("missing", MISSING),
        ("result", RESULTS),
        ("dtype", ("auto", *DTYPES)),
        ("check", CHECKS),
    ):
        if config[key] not in known:
            raise ConfigError(unknown(key, str(config[key]), known))
    for key in ("max_memory", "shard_gb", "threads", "rank"):
        if config[key] is not None and not 0 < config[key] < math.inf:
            raise ConfigError(f"{key}={config[key]} must be positive and finite")
    if config.greedy and not config.tasks:
        raise ConfigError("greedy=true needs held-out tasks to score with: +data@tasks.NAME=SOURCE")
    if config.resume not in (None, "auto"):
        raise ConfigError(f"resume={config.resume}: expected auto, which goes on with what run_dir holds")
    _check_result(config)


def _check_result(config: DictConfig) -> None:
    """Refuse what only the other kind of result has."""
    if config.result == "model":
        if config.rank is not None:
            raise ConfigError(f"rank={config.rank} is of an adapter; set result=adapter too")
        return
    for key, plain in (("dtype", "auto"), ("missing", "refuse"), ("greedy", False)):
        if config[key] != plain:
            raise ConfigError(f"{key}={config[key]} is of a whole model; leave it out, or set result=model")


@contextlib.contextmanager
def opened_models(config: DictConfig, merger: Merger) -> Iterator[tuple[list[MergeInput], MergeInput | None]]:
    """Open the models for the block, and begin to hash them."""
    inputs, base = open_models(config, merger)
    models = (*inputs, *([base] if base else []))
    try:
        with hashing([model.hashes for model in models]):
            yield inputs, base
    finally:
        for model in models:
            model.checkpoint.close()


def open_models(config: DictConfig, merger: Merger) -> tuple[list[MergeInput], MergeInput | None]:
    """Open the models, in an order that the command line has no say in, and the base if `merger` needs one.

    Raises:
        ConfigError: There are too few or too many, or the base is missing.
        ModelError: One is not there, or cannot be merged.
    """
    given: Any = (
        OmegaConf.to_container(config.models) if OmegaConf.is_config(config.models) else config.models
    )
    paths = labelled(given)
    labels = sorted(paths) if merger.symmetric else list(paths)
    _check_count(config.merger.name, merger, len(labels))
    merger.check(labels)
    if config.missing == "base" and not merger.needs_base:
        raise ConfigError(
            f"missing=base: merger={config.merger.name} looks at no base; missing=present merges the models "
            "that have a tensor"
        )
    work = Path(config.run_dir)
    inputs = [open_input(label, paths[label], work) for label in labels]
    if not merger.needs_base:
        return inputs, None
    if config.base is not None:
        return inputs, open_input(BASE, str(config.base), work)
    folders = {model.ground for model in inputs}
    if len(folders) > 1 or not all(model.adapter_folder for model in inputs):
        raise ConfigError(
            f"merger={config.merger.name} works on differences to the model that all were tuned from: "
            "set base=MODEL"
        )
    return inputs, open_input(BASE, str(folders.pop()), work)


def _check_count(name: str, merger: Merger, count: int) -> None:
    if count < merger.least_inputs:
        raise ConfigError(f"merger={name} needs {merger.least_inputs} models at least, not {count}")
    if merger.most_inputs is not None and count > merger.most_inputs:
        raise ConfigError(f"merger={name} takes {merger.most_inputs} models at most, not {count}")
