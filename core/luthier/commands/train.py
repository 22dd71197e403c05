"""`train`: from a composed config to a result, each step one line."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig
from torch import nn

from luthier.commands.preparation import prepared
from luthier.commands.recorder import Recorder
from luthier.commands.stages import do_stages
from luthier.data import Batches, steps_of
from luthier.engine import Loop, Plan, Progress, TrainingRun, Watched, schedule
from luthier.errors import ConfigError
from luthier.evaluation import Evaluator, evaluator_of
from luthier.runs import (
    SUMMARY,
    Checkpoint,
    Checkpoints,
    EvaluationReport,
    TrainingState,
    TrainResult,
    as_json,
    caught,
    completed,
    finished,
    header,
    hooks,
    parameter_counts,
    run_folder,
    versions,
    write_config,
    write_json,
    writing,
)
from luthier.system import Processes, Watch, peak_memory_mb, written_whole

log = logging.getLogger("luthier")


def train(config: DictConfig) -> TrainResult:
    """Fine-tune as `config` says and leave a run folder; with `resume`, go on where a run stopped.

    Under `accelerate launch`, every process calls it.

    Args:
        config: What `luthier.compose("train", overrides)` returns.

    Raises:
        LuthierError: Something a person can mend; one line says what, where and how.
    """
    processes = Processes.launched()
    if not processes.main:
        log.setLevel(logging.ERROR)
    if config.stages:
        processes.after_main(lambda: _earlier(config))
    with run_folder(config, processes) as run_dir:
        if done := completed(config, run_dir):
            log.warning("%s is complete: all %d steps are done", run_dir, done.steps)
            return done
        return _Training.prepare(config, run_dir, processes).go()


def _earlier(config: DictConfig) -> None:
    if not finished(Path(config.run_dir)):
        do_stages({str(name): str(line) for name, line in config.stages.items()})


@dataclass(frozen=True)
class _Training:
    """A prepared run, with what it trains on and is measured by; `go` is its story."""

    run: TrainingRun
    batches: Batches
    evaluator: Evaluator | None
    twin: nn.Module | None

    @classmethod
    def prepare(cls, config: DictConfig, run_dir: Path, processes: Processes) -> _Training:
        """Build every method, load the model, attach the adapter, encode the data."""
        run = prepared(config, run_dir, processes)
        batches = run.objective.batches(run)
        evaluator = evaluator_of(
            config, run.policy, run.loaded, run.objective, run.rows.held_out, processes, batches
        )
        hooks(processes).after_model_prepared(model=run.loaded.model, config=config)
        return cls(run, batches, evaluator, processes.distribute(run.policy))

    def go(self) -> TrainResult:
        """Evaluate, train, evaluate, save, read back, sum up."""
        hook = hooks(self.run.processes)
        each = self.batches.steps_per_epoch
        total_steps = steps_of(self.run.config, each)
        recorder = self._recorder(total_steps)
        checkpoint = self._checkpoint(recorder.checkpoints, total_steps)
        progress = recorder.resume(checkpoint) if checkpoint else Progress()
        if self.run.processes.main:
            (self.run.run_dir / SUMMARY).unlink(missing_ok=True)  # of the run before it went on for longer
            write_config(self.run.config, self.run.run_dir)
        held_out = self.evaluator.held_out if self.evaluator else None
        # Once it is known to be the same run: a tracker may open its own now.
        hook.after_header(
            lines=header(self.run.config, self.run.loaded, self.run.rows.data, held_out, total_steps, each)
        )
        if checkpoint is None:
            recorder.before = recorder.evaluated(0, answer=True)
        hook.before_train(
            run_dir=self.run.run_dir,
            config=self.run.config,
            total_steps=total_steps,
            start_step=progress.step,
        )
        planned = hook.forecast_memory(
            run=self.run,
            batches=self.batches,
            optimiser=recorder.state.optimiser,
            total_steps=recorder.total_steps,
        )
        watch = Watch(self.run.policy.device)
        with caught() as recorder.signalled:
            self._loop(recorder, progress, watch).run()
        return self._finish(recorder, progress, (planned, watch.highest_mb))

    def _finish(
        self, recorder: Recorder, progress: Progress, memory: tuple[float | None, float | None]
    ) -> TrainResult:
        highest = peak_memory_mb(self.run.policy.device)
        restored = self._restore_best(recorder, progress)
        # Saved first: whatever the evaluation meets, the training is not lost.
        self._save()
        after = recorder.evaluated(restored or progress.step, answer=True)
        result = self._result(progress, recorder.before, after, highest, restored)
        result = dataclasses.replace(result, predicted_memory_mb=memory[0], measured_memory_mb=memory[1])
        if self.run.processes.main:
            write_json(self.run.run_dir / SUMMARY, as_json(result))
        hooks(self.run.processes).after_train(result=result)
        return result

    def _loop(self, recorder: Recorder, progress: Progress, watch: Watch) -> Loop:
        plan = Plan(
            total_steps=recorder.total_steps,
            pack_tokens=self.run.config.pack_tokens,
            max_grad_norm=self.run.config.max_grad_norm,
            log_every=self.run.config.log_every,
            evaluate_every=self.run.config.evaluation.every if self.evaluator else 0,
            patience=self.run.config.evaluation.patience,
            keep_best=self.run.config.evaluation.restore_best,
            skips_non_finite=self.run.optimiser.skips_non_finite,
        )
        state = recorder.state
        state.optimiser.register_step_pre_hook(lambda *_: watch.look(0))  # all gradients are there
        largest = max(
            (p for p in self.run.loaded.model.parameters() if p.requires_grad), key=lambda p: p.numel()
        )
        largest.register_hook(lambda _: watch.look(0))  # and here both, which may be more
        objective = Watched(self.run.objective, watch)
        return Loop(
            self.run.policy,
            objective,
            self.batches,
            state.optimiser,
            state.schedule,
            plan,
            recorder,
            progress,
            self.run.processes,
        )

    def _recorder(self, total_steps: int) -> Recorder:
        trained = [(name, p) for name, p in self.run.loaded.model.named_parameters() if p.requires_grad]
        optimiser = self.run.optimiser.build(trained)
        lr_schedule = schedule(self.run.config.schedule, optimiser, total_steps)
        state = TrainingState(self.run.loaded.model, optimiser, lr_schedule, self.run.processes)
        return Recorder(
            self.run.config,
            self.run.run_dir,
            self.run.rows.data,
            self.evaluator,
            state,
            self.run.processes,
            total_steps,
        )

    def _checkpoint(self, checkpoints: Checkpoints, total_steps: int) -> Checkpoint | None:
        """Return what to go on from; every process takes the main one's choice."""
        if not self.run.config.resume:
            return None
        newest = checkpoints.newest() if self.run.processes.main else None
        step, lost = self.run.processes.same((newest.step if newest else None, bool(checkpoints.steps())))
        if step is None and (lost or (self.run.run_dir / SUMMARY).exists()):
            raise ConfigError(
                f"{self.run.run_dir} holds no whole checkpoint to go on from; "
                "start a new run in another run_dir"
            )
        if step is None:
            if self.run.config.resume != "auto":
                log.warning("%s holds no checkpoint: the run starts anew", self.run.run_dir)
            return None
        if step > total_steps:
            raise ConfigError(
                f"{self.run.run_dir} has {step} steps behind it; max_steps or epochs ask for {total_steps}, "
                "expected at least as many"
            )
        return Checkpoint(checkpoints.folder(step), step)

    def _restore_best(self, recorder: Recorder, progress: Progress) -> int | None:
        best = progress.best_step
        if not (self.run.config.evaluation.restore_best and best) or best == progress.step:
            return None
        recorder.state.restore_weights(recorder.checkpoints.at(best).load().tensors["weights"])
        return best

    def _save(self) -> None:
        model = self.run.processes.gather_into(self.twin, self.run.loaded.model)

        def write() -> None:
            folder = self.run.run_dir / "model"
            left = "make room, and go on from the last checkpoint: resume=auto"
            with writing(folder, left), written_whole(folder) as fresh:
                self.run.adapter.save(model, fresh, self.run.loaded.name)
                self.run.loaded.tokenizer.save_pretrained(fresh)
                self.run.loaded.model.generation_config.save_pretrained(fresh)

        self.run.processes.after_main(write)

    def _result(
        self,
        progress: Progress,
        before: EvaluationReport | None,
        after: EvaluationReport | None,
        highest: float,
        restored: int | None,
    ) -> TrainResult:
        trained, total = parameter_counts(self.run.loaded.model)
        assert progress.first_loss is not None
        return TrainResult(
            run_dir=self.run.run_dir,
            model_dir=self.run.run_dir / "model",
            steps=progress.step,
            first_loss=progress.first_loss,
            last_loss=progress.last_loss,
            before=before,
            after=after,
            trainable_parameters=trained,
            total_parameters=total,
            tokens=progress.tokens,
            tokens_per_second=progress.tokens / progress.seconds,
            seconds=progress.seconds,
            peak_memory_mb=highest,
            versions=versions(),
            restored_step=restored,
        )
