"""Greedy merging: a model stays out if the held-out score drops with it (arXiv 2203.05482, recipe 1)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from luthier.merge_inputs import MergeInput
from luthier.merge_scores import task_scores
from luthier.merger import Merger


def greedily(
    config: DictConfig, merger: Merger, inputs: list[MergeInput], base: MergeInput | None, run_dir: Path
) -> list[MergeInput]:
    """Return the models to merge: the best one, and in the order of their scores those that do not lower it.

    Every candidate is merged and scored on `config.tasks`; its score is the mean over the tasks.

    Raises:
        LuthierError: A model cannot be merged or scored.
    """
    from luthier.merging import merge_models

    console = Console(highlight=False)
    alone = {one.label: _mean(task_scores(config, str(one.folder))) for one in inputs}
    order = sorted(inputs, key=lambda one: -alone[one.label])
    for one in order:
        console.print(f"{one.label} alone: {alone[one.label]:.3f}")
    chosen, best = [order[0]], alone[order[0].label]
    trial = run_dir / "greedy"
    for one in order[1:]:
        tried = [member for member in inputs if member in (*chosen, one)]
        shutil.rmtree(trial, ignore_errors=True)
        merge_models(config, merger, tried, base, trial, run_dir / "greedy.merging")
        score = _mean(task_scores(config, trial))
        kept = score >= best
        console.print(f"with {one.label}: {score:.3f}, {'kept' if kept else 'left out'}")
        if kept:
            chosen, best = tried, score
    shutil.rmtree(trial, ignore_errors=True)
    return chosen


def _mean(scores: Mapping[str, float]) -> float:
    return sum(scores.values()) / len(scores)
