"""In which order a run sees its rows, and for how many steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from omegaconf import DictConfig

from luthier.data.run_data import RunRows
from luthier.data.sampler import Sampler
from luthier.errors import ConfigError
from luthier.trees import Tree


def sampler_of(config: DictConfig, rows: int, batch_size: int | None = None) -> Sampler:
    """Return the order in which a run sees its `rows`, so many at a time; None: an optimiser step's."""
    return Sampler(rows, batch_size or config.batch_size, config.shuffle, config.seed)


def steps_of(config: DictConfig, steps_per_epoch: int) -> int:
    """Return how many optimiser steps `config` asks for.

    Raises:
        ConfigError: None.
    """
    if not 0 < config.epochs < math.inf:
        raise ConfigError(f"epochs={config.epochs} must be positive: no step to train")
    return int(config.max_steps or math.ceil(config.epochs * steps_per_epoch))


def seen_trees(config: DictConfig, rows: RunRows) -> list[Sequence[Tree]]:
    """Return the trees that a run will see: of the rows to train on, and the held-out ones."""
    sampler, trees = sampler_of(config, len(rows.data)), rows.data.trees
    seen = trees.select(sampler.visited(steps_of(config, sampler.steps_per_epoch)))
    return [seen, *([rows.held_out[1].trees] if rows.held_out else [])]
