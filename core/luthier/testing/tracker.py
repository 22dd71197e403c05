"""The suite of trackers."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pluggy
import pytest
from omegaconf import OmegaConf
from torch import nn

from luthier.commands import TrainConfig
from luthier.config import prepare
from luthier.contracts import PROJECT, SPECIFICATIONS, Tracker
from luthier.runs import EvaluationReport, Sample, StepReport, TrainResult, versions
from luthier.testing.suite import Suite


class TrackerSuite(Suite):
    """What a `luthier.Tracker` promises, by telling it of a run in which nothing is trained."""

    method: ClassVar[type[Tracker]]

    def events(self, run_dir: Path, error: BaseException | None = None) -> list[str]:
        """Tell a fresh tracker of a run, whole or ended by `error`; return what it listens to."""
        prepare()
        manager = pluggy.PluginManager(PROJECT)
        for specification in SPECIFICATIONS:
            manager.add_hookspecs(specification)
        manager.register(self.make())
        manager.check_pending()
        run_dir.mkdir(parents=True, exist_ok=True)
        config = OmegaConf.create(
            OmegaConf.to_container(OmegaConf.structured(TrainConfig(run_dir=str(run_dir))))
        )
        model, hook = nn.Linear(2, 2), manager.hook
        before = [p.clone() for p in model.parameters()]
        hook.after_config_composed(config=config)
        hook.after_model_prepared(model=model, config=config)
        hook.after_header(lines=["model     a toy", "data      two rows"])
        hook.after_evaluation(report=evaluation(0))
        hook.before_train(run_dir=run_dir, config=config, total_steps=2, start_step=0)
        for number in (1, 2):
            hook.after_step(report=step_report(number))
        if error is not None:
            hook.on_train_error(error=error)
        else:
            hook.after_checkpoint_saved(folder=run_dir / "checkpoints" / "2")
            hook.after_evaluation(report=evaluation(2))
            hook.after_train(result=result(run_dir))
        unchanged = all((p == q).all() for p, q in zip(model.parameters(), before, strict=True))
        assert unchanged, "a tracker observes; it changed the model"
        callers = manager.get_hookcallers(next(iter(manager.get_plugins()))) or []
        return [caller.name for caller in callers]

    def test_it_observes_a_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It listens to something, takes every call of a run, and writes nowhere but in the run's folder."""
        monkeypatch.chdir(tmp_path)
        assert self.events(tmp_path / "run"), "it listens to nothing; mark its methods with @luthier.hookimpl"
        beside = [path.name for path in tmp_path.iterdir() if path.name != "run"]
        assert not beside, f"it wrote {beside} beside the run's folder"

    def test_it_survives_a_run_that_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It takes the end of a run by an error, Ctrl-C included, and the next run after it."""
        monkeypatch.chdir(tmp_path)
        self.events(tmp_path / "first", RuntimeError("out of memory"))
        self.events(tmp_path / "second", KeyboardInterrupt())
        self.events(tmp_path / "third")


def step_report(step: int) -> StepReport:
    """Return what a logging point reports."""
    return StepReport(
        step=step, total_steps=2, epoch=step / 2, loss=2.0 / step, metrics={"margin": 0.5},
        learning_rate=1e-4, grad_norm=1.0, tokens=100 * step, tokens_per_second=50.0,
        memory_mb=10.0, seconds=2.0 * step,
    )  # fmt: skip


def evaluation(step: int) -> EvaluationReport:
    """Return what an evaluation reports."""
    sample = Sample("row 0", "What is 12 + 7?", "19", "19", 1.0)
    return EvaluationReport(step, 1.5, 4.5, 1.0, rows=1, scored=1, samples=[sample])


def result(run_dir: Path) -> TrainResult:
    """Return what a run of two steps comes to."""
    return TrainResult(
        run_dir=run_dir, model_dir=run_dir / "model", steps=2, first_loss=2.0, last_loss=1.0,
        before=evaluation(0), after=evaluation(2), trainable_parameters=4, total_parameters=6, tokens=200,
        tokens_per_second=50.0, seconds=4.0, peak_memory_mb=10.0, versions=versions(),
    )  # fmt: skip
