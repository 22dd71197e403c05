"""Learning-rate schedules: transformers' own, by name."""

import torch
from transformers.optimization import get_scheduler

from luthier.config import ScheduleConfig
from luthier.errors import ConfigError, unknown

NAMES = (
    "constant",
    "constant_with_warmup",
    "cosine",
    "cosine_with_restarts",
    "inverse_sqrt",
    "linear",
    "polynomial",
)
"""Those of transformers that need no further argument."""


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
    """Return the schedule named in `settings`.

    Raises:
        ConfigError: transformers has no schedule of that name.
    """
    if settings.name not in NAMES:
        raise ConfigError(f"schedule.name: {unknown('schedule', settings.name, NAMES)}")
    warmup = warmup_steps(settings, total_steps)
    made: torch.optim.lr_scheduler.LRScheduler = get_scheduler(settings.name, optimiser, warmup, total_steps)
    return made
