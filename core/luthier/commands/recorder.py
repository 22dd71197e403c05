"""What happens around the steps of a run: reports, evaluations, checkpoints, and stopping in order."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from omegaconf import DictConfig, OmegaConf

from luthier.data import Encoded
from luthier.engine import Progress
from luthier.evaluation import Evaluator
from luthier.runs import (
    LONGER,
    Checkpoint,
    Checkpoints,
    EvaluationReport,
    Snapshot,
    StepReport,
    StoppedError,
    TrainingState,
    as_json,
    check_config,
    check_lock,
    check_rows,
    evaluation_of,
    hooks,
    lock_of,
)
from luthier.system import Processes

log = logging.getLogger("luthier")


@dataclass
class Recorder:
    """The loop's observer: every process has one and calls it alike; the main one writes.

    Attributes:
        before: The evaluation before training, which a checkpoint keeps.
        signalled: Returns the number of the signal that came, or 0.
    """

    config: DictConfig
    run_dir: Path
    data: Encoded
    evaluator: Evaluator | None
    state: TrainingState
    processes: Processes
    total_steps: int
    before: EvaluationReport | None = None
    signalled: Callable[[], int] = field(default=lambda: 0)

    def __post_init__(self) -> None:
        """Find the checkpoints' place and start the clock between them."""
        self.checkpoints = Checkpoints(self.run_dir / "checkpoints", self.config.checkpoint.keep)
        self._hook = hooks(self.processes)
        self._last = time.monotonic()
        self._stop = 0

    def resume(self, checkpoint: Checkpoint) -> Progress:
        """Take up everything `checkpoint` holds, and return where the run stands.

        Raises:
            ConfigError: Config or data changed since.
            ModelError: It belongs to another model.
        """
        changed = check_config(self.config, checkpoint.config(), checkpoint.folder)
        for key in LONGER:
            if key in changed:
                log.warning("%s: the schedule follows the new length", changed[key])
        snapshot = checkpoint.load()
        check_rows(self._rows(), snapshot.tensors["rows"]["train"], self._origin)
        check_lock(lock_of(self.config), checkpoint.lock())
        self.state.restore(snapshot)
        self.before = evaluation_of(snapshot.values["before"])
        progress = Progress(**snapshot.values["progress"])
        if self.processes.main:  # a kill may have left older ones
            self.checkpoints.prune(progress.step, self._best(progress))
        return progress

    def evaluated(self, step: int, answer: bool) -> EvaluationReport | None:
        """Evaluate and tell the trackers; None without held-out rows."""
        if self.evaluator is None:
            return None
        report = self.evaluator.report(step, answer)
        self._hook.after_evaluation(report=report)
        return report

    def log(self, report: StepReport) -> None:
        """Tell the trackers of a logging point."""
        self._hook.after_step(report=report)

    def evaluate(self, step: int) -> float:
        """Return the held-out loss at `step`."""
        report = self.evaluated(step, answer=False)
        assert report is not None
        return report.loss

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due: by steps or by time, and after the last step."""
        settings = self.config.checkpoint
        if settings.every == 0:
            return False
        if step == self.total_steps:
            return True
        if settings.every is not None:
            return bool(step % settings.every == 0)
        # Processes must agree, so they ask each other only now and then.
        ask = self.processes.count == 1 or step % self.config.log_every == 0
        return ask and self.processes.same(time.monotonic() - self._last >= 60 * settings.minutes)

    def save(self, progress: Progress) -> None:
        """Save a checkpoint of everything.

        Raises:
            LuthierError: It cannot be written; the earlier ones are untouched.
        """
        snapshot = self.state.capture(dataclasses.asdict(progress))
        if self.processes.main:
            self._write(snapshot, progress)
        self._last = time.monotonic()

    def stopping(self, step: int) -> bool:
        """Whether a signal came, to any process."""
        if self.processes.count == 1:
            self._stop = self.signalled()
        elif step % self.config.log_every == 0 or step == self.total_steps:
            self._stop = max(self.processes.gather(self.signalled()))
        return bool(self._stop)

    def leave(self, step: int) -> NoReturn:
        """End a run that was told to stop.

        Raises:
            StoppedError: Always.
        """
        raise StoppedError(self._stop, step, self.run_dir)

    def _write(self, snapshot: Snapshot, progress: Progress) -> None:
        tensors = {**snapshot.tensors, "rows": {"train": self._rows()}}
        values = {**snapshot.values, "before": None if self.before is None else as_json(self.before)}
        folder = self.checkpoints.write(
            progress.step,
            Snapshot(tensors, values),
            OmegaConf.to_yaml(self.config, resolve=True),
            lock_of(self.config),
            self._best(progress),
        )
        self._hook.after_checkpoint_saved(folder=folder)

    def _best(self, progress: Progress) -> int | None:
        return progress.best_step if self.config.evaluation.restore_best and progress.best_step else None

    def _rows(self) -> torch.Tensor:
        if not hasattr(self, "_digests"):
            self._digests = self.data.digests()
        return self._digests

    def _origin(self, row: int) -> str:
        return self.data.trees[row].origin
