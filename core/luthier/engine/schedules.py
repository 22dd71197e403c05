"""Learning-rate schedules: those of transformers by name, with a warm-up whose first step trains too."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR

from luthier.engine.options import ScheduleConfig
from luthier.errors import ConfigError, unknown

LEAST = 1e-7
"""The rate at which `polynomial` ends."""
LATE = 10_000
"""The steps that `inverse_sqrt` begins at without a warm-up."""


@dataclass(frozen=True)
class Place:
    """Where in a run a step behind the warm-up is.

    Attributes:
        step: Steps before it.
        warmup: Steps of warm-up.
        share: Of the steps behind the warm-up, how much is done: 0 to 1.
        rate: The optimiser's learning rate.
    """

    step: int
    warmup: int
    share: float
    rate: float


def _cosine(place: Place) -> float:
    return (1.0 + math.cos(math.pi * place.share)) / 2


def _inverse_sqrt(place: Place) -> float:
    return math.sqrt(place.warmup / place.step) if place.warmup else math.sqrt(LATE / (place.step + LATE))


SCHEDULES: Mapping[str, Callable[[Place], float]] = {
    "constant": lambda _: 1.0,
    "constant_with_warmup": lambda _: 1.0,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine,  # of one cycle, as in transformers where nobody says how many
    "inverse_sqrt": _inverse_sqrt,
    "linear": lambda place: 1.0 - place.share,
    "polynomial": lambda place: 1.0 - place.share + place.share * min(1.0, LEAST / place.rate),
}
"""Name → the factor of the learning rate."""


def warmup_steps(settings: ScheduleConfig, total_steps: int) -> int:
    """Return the steps of warm-up: `warmup` is a share of all steps below 1, else a number of steps."""
    if not settings.warmup >= 0:
        raise ConfigError(f"schedule.warmup: {settings.warmup} is negative or no number")
    steps = round(settings.warmup * total_steps if settings.warmup < 1 else settings.warmup)
    if steps > total_steps:
        raise ConfigError(f"schedule.warmup: {steps} steps of warm-up are more than the run's {total_steps}")
    return steps


def schedule(
    settings: ScheduleConfig, optimiser: torch.optim.Optimizer, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return the schedule named in `settings`; step i of W of its warm-up has (i + 1) / W of the rate.

    Raises:
        ConfigError: There is no schedule of that name.
    """
    if settings.name not in SCHEDULES:
        raise ConfigError(f"schedule.name: {unknown('schedule', settings.name, SCHEDULES)}")
    warmup = 0 if settings.name == "constant" else warmup_steps(settings, total_steps)
    left, rate, of = max(1, total_steps - warmup), optimiser.param_groups[0]["lr"], SCHEDULES[settings.name]

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return of(Place(step, warmup, min(1.0, (step - warmup) / left), rate))

    return LambdaLR(optimiser, factor)
