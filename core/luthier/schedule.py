"""Learning-rate schedules: transformers' own, by name."""

import torch
from transformers.optimization import get_scheduler
from transformers.trainer_utils import SchedulerType

from luthier.errors import ConfigError, unknown
from luthier.settings import ScheduleConfig


def warmup_steps(settings: ScheduleConfig, total_steps: int) -> int:
    """Return the steps of warm-up: `warmup` is a share of all steps below 1, else a number of steps."""
    if settings.warmup < 0:
        raise ConfigError(f"schedule.warmup: {settings.warmup} is negative")
    steps = settings.warmup * total_steps if settings.warmup < 1 else settings.warmup
    return round(steps)


def schedule(
    settings: ScheduleConfig, optimiser: torch.optim.Optimizer, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return the schedule named in `settings`.

    Raises:
        ConfigError: transformers has no schedule of that name.
    """
    names = {str(kind.value) for kind in SchedulerType}
    if settings.name not in names:
        raise ConfigError(f"schedule.name: {unknown('schedule', settings.name, names)}")
    warmup = warmup_steps(settings, total_steps)
    made: torch.optim.lr_scheduler.LRScheduler = get_scheduler(settings.name, optimiser, warmup, total_steps)
    return made
