"""Greedy merging: a model stays out if the held-out score drops with it (arXiv 2203.05482, recipe 1)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from omegaconf import DictConfig

from luthier_plugins.commands.merge.io.inputs import MergeInput
from luthier_plugins.commands.merge.run.scores import task_scores
from luthier_toolkits.terminal import SafeConsole, shown


def greedily(
    config: DictConfig,
    inputs: list[MergeInput],
    run_dir: Path,
    merge: Callable[[list[MergeInput], Path, Path], object],
) -> list[MergeInput]:
    """Return the models to merge: the best one, and in the order of their scores those that do not lower it.

    Every candidate is merged and scored on `config.tasks`; its score is the mean over the tasks.

    Args:
        config: That of the merge.
        inputs: All models.
        run_dir: Where candidates are tried.
        merge: Merges models to a folder, with another one to work in.

    Raises:
        LuthierError: A model cannot be merged or scored.
    """
    console = SafeConsole()
    alone = {model.label: _mean(task_scores(config, str(model.folder))) for model in inputs}
    order = sorted(inputs, key=lambda model: -alone[model.label])
    for model in order:
        console.print(f"{shown(model.label)} alone: {alone[model.label]:.3f}")
    chosen, best = [order[0]], alone[order[0].label]
    trial = run_dir / "greedy"
    for model in order[1:]:
        tried = [member for member in inputs if member in (*chosen, model)]
        shutil.rmtree(trial, ignore_errors=True)
        merge(tried, trial, run_dir / "greedy.merging")
        score = _mean(task_scores(config, trial))
        kept = score >= best
        console.print(f"with {shown(model.label)}: {score:.3f}, {'kept' if kept else 'left out'}")
        if kept:
            chosen, best = tried, score
    shutil.rmtree(trial, ignore_errors=True)
    return chosen


def _mean(scores: Mapping[str, float]) -> float:
    return sum(scores.values()) / len(scores)
