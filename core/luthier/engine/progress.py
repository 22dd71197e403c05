"""What a run of the training loop knows: its plan, where it stands, whom it tells."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

from luthier.runs import StepReport


@dataclass(frozen=True)
class Plan:
    """What a run of the loop needs to know.

    Attributes:
        total_steps: Optimiser steps.
        pack_tokens: Tokens one forward pass may hold.
        max_grad_norm: Largest global gradient norm, or None.
        log_every: Steps between logging points.
        evaluate_every: Steps between evaluations; 0: none.
        patience: Evaluations without a better loss before the run stops; None: it does not.
        keep_best: Save a checkpoint whenever an evaluation is the best so far.
        skips_non_finite: The optimiser leaves out gradients that are not finite.
    """

    total_steps: int
    pack_tokens: int
    max_grad_norm: float | None
    log_every: int
    evaluate_every: int = 0
    patience: int | None = None
    keep_best: bool = False
    skips_non_finite: bool = False


@dataclass
class Progress:
    """Where a run stands; a checkpoint holds it, so every field is JSON.

    Attributes:
        step: Optimiser steps done.
        tokens: Tokens processed.
        seconds: Training time, evaluations and checkpoints not counted.
        window_tokens: Of those tokens, the ones since the last logging point.
        window_seconds: Of that time, what passed since.
        window: What the meter holds since.
        first_loss: Loss of the first step.
        last_loss: Loss at the last logging point.
        best_loss: Lowest held-out loss.
        best_step: Where it was.
        worse: Evaluations since.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    window_tokens: int = 0
    window_seconds: float = 0.0
    window: dict[str, tuple[float, float]] = field(default_factory=dict)
    first_loss: float | None = None
    last_loss: float = math.nan
    best_loss: float | None = None
    best_step: int = 0
    worse: int = 0


class Observer(Protocol):
    """What the loop calls; every process does, the main one acts."""

    def log(self, report: StepReport) -> None:
        """A logging point was reached."""

    def evaluate(self, step: int) -> float:
        """Evaluate and return the held-out loss."""

    def due(self, step: int) -> bool:
        """Whether a checkpoint should be saved after `step`."""

    def save(self, progress: Progress) -> None:
        """Save a checkpoint."""

    def stopping(self, step: int) -> bool:
        """Whether the run was told to stop; asked after every step."""

    def leave(self, step: int) -> None:
        """Raise what ends a run that was told to stop."""
