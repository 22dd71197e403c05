"""What a run is going to take, said to the run itself before its first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier import hookimpl

if TYPE_CHECKING:
    import torch

    from luthier.data import Batches
    from luthier.engine import TrainingRun


@hookimpl
def forecast_memory(
    run: TrainingRun, batches: Batches, optimiser: torch.optim.Optimizer, total_steps: int
) -> float | None:
    """Return the memory of the steps in MiB, planned from shapes."""
    from luthier_plugins.commands.plan.observer import forecast

    return forecast(run, batches, optimiser, total_steps)
