"""`train`: from a composed config to a result, each step one line."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import nn

from luthier import config as configs
from luthier import resume, signals
from luthier.adapter import Adapter
from luthier.adapter_start import gone_on_with
from luthier.batches import Batches, RowBatches
from luthier.before import do_before
from luthier.checkpoint import Checkpoint, Checkpoints
from luthier.combining import check_processes
from luthier.data import Encoded
from luthier.engine import Loop
from luthier.errors import ConfigError
from luthier.evaluation import Evaluator
from luthier.head_start import give_head
from luthier.header import header, parameter_counts
from luthier.measuring import evaluator_of
from luthier.model import LoadedModel, load_model
from luthier.model_policy import policy_of
from luthier.objective import Objective
from luthier.online_start import check_online, rollouts_of, scoring_of
from luthier.optimiser import Optimiser
from luthier.parallel import Processes
from luthier.peak import Watch, peak_memory_mb
from luthier.plan_memory import Methods
from luthier.plan_run import Watched, packs_of, predicted
from luthier.policy import Policy
from luthier.pretrained import quiet
from luthier.progress import Plan, Progress
from luthier.recorder import Recorder
from luthier.reference_pass import check_reference, measured_in_training
from luthier.report import (
    EvaluationReport,
    TrainResult,
    as_json,
    versions,
    write_json,
)
from luthier.run_data import objective_of, training_rows
from luthier.run_folder import SUMMARY, finished, hooks, run_folder, write_config
from luthier.schedule import schedule
from luthier.state import TrainingState, seed_everything
from luthier.training_order import sampler_of, seen_trees, steps_of
from luthier.wide_residual import wants_wide

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
    if config.before and processes.main and not finished(Path(config.run_dir)):
        do_before({str(name): str(line) for name, line in config.before.items()})
    processes.same(None)  # the others wait
    with run_folder(config, processes) as run_dir:
        if done := resume.completed(config, run_dir):
            log.warning("%s is complete: all %d steps are done", run_dir, done.steps)
            return done
        return _Training.prepare(config, run_dir, processes).go()


@dataclass(frozen=True)
class _Training:
    """Everything a training run holds; `go` is its story."""

    config: DictConfig
    run_dir: Path
    processes: Processes
    loaded: LoadedModel
    adapter: Adapter
    optimiser: Optimiser
    objective: Objective
    policy: Policy
    data: Encoded
    batches: Batches
    evaluator: Evaluator | None
    twin: nn.Module | None

    @classmethod
    def prepare(cls, config: DictConfig, run_dir: Path, processes: Processes) -> _Training:
        """Build every method, load the model, attach the adapter, encode the data."""
        seed_everything(config.seed, processes.rank)
        optimiser: Optimiser = configs.build("optimiser", config.optimiser)
        check_processes(config.optimiser.name, optimiser, processes)
        adapter: Adapter = configs.build("adapter", config.adapter)
        objective = objective_of(config)
        if objective.online:
            check_online(config, processes)
        check_reference(config, objective.needs_reference)
        quantiser = configs.build("quantiser", config.quantiser) if config.quantiser else None
        base = adapter.trains_base
        loaded = load_model(config.model, train_base=base, quantiser=quantiser, train_adapter=not base)
        adapter = gone_on_with(adapter, config.adapter.name, loaded)
        if loaded.quantised and processes.sharded:
            raise ConfigError(
                "a quantised model cannot be sharded: launch without --use_fsdp, which gives every process "
                "the whole of it, or leave out quantiser"
            )
        rows = training_rows(config, loaded, objective)
        if adapter is not loaded.attached:
            adapter.attach(loaded.model, torch.Generator().manual_seed(config.seed))
        give_head(loaded, objective, config.objective.name, config.seed)
        if config.model.gradient_checkpointing:
            with quiet():
                loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
        # After the adapter, which may have changed the output head that the policy looks at.
        wide = wants_wide(config.model.wide_residual, objective.needs_reference)
        policy = policy_of(loaded, config.model.fused, wide)
        if objective.needs_reference:
            trees = seen_trees(config, rows)
            policy.references = measured_in_training(config, run_dir, loaded, policy, trees, processes)
        scoring = scoring_of(config, loaded, rows) if objective.online else None
        batches: Batches = RowBatches(rows.data.trees, sampler_of(config, len(rows.data)))
        if scoring:
            batches = rollouts_of(config, run_dir, loaded, policy, objective, rows, scoring, processes)
        evaluator = evaluator_of(config, policy, loaded, objective, rows.held_out, processes, scoring)
        hooks(processes).after_model_prepared(model=loaded.model, config=config)
        twin = processes.distribute(policy)
        return cls(
            config, run_dir, processes, loaded, adapter, optimiser, objective, policy, rows.data, batches,
            evaluator, twin,
        )  # fmt: skip

    def go(self) -> TrainResult:
        """Evaluate, train, evaluate, save, read back, sum up."""
        hook = hooks(self.processes)
        each = self.batches.steps_per_epoch
        total_steps = steps_of(self.config, each)
        recorder = self._recorder(total_steps)
        checkpoint = self._checkpoint(recorder.checkpoints, total_steps)
        progress = recorder.resume(checkpoint) if checkpoint else Progress()
        if self.processes.main:
            (self.run_dir / SUMMARY).unlink(missing_ok=True)  # of the run before it went on for longer
            write_config(self.config, self.run_dir)
        held_out = self.evaluator.held_out if self.evaluator else None
        # Once it is known to be the same run: a tracker may open its own now.
        hook.after_header(lines=header(self.config, self.loaded, self.data, held_out, total_steps, each))
        if checkpoint is None:
            recorder.before = recorder.evaluated(0, answer=True)
        hook.before_train(
            run_dir=self.run_dir, config=self.config, total_steps=total_steps, start_step=progress.step
        )
        planned = self._predicted(recorder)
        watch = Watch(self.policy.device)
        with signals.caught() as recorder.signalled:
            self._loop(recorder, progress, watch).run()
        return self._finish(recorder, progress, (planned, watch.highest_mb))

    def _predicted(self, recorder: Recorder) -> float | None:
        if not isinstance(self.batches, RowBatches):
            log.info("memory is not predicted: answers have no length before they are made")
            return None
        quantiser = configs.build("quantiser", self.config.quantiser) if self.config.quantiser else None
        methods = Methods(self.adapter, self.optimiser, self.objective, quantiser)
        options = self.config.model.fused, self.config.model.gradient_checkpointing
        packs = packs_of(self.data.trees, self.batches.sampler, recorder.total_steps, self.config.pack_tokens)
        built = recorder.state.optimiser
        return predicted(self.loaded, methods, options, packs, self.processes, built)

    def _finish(
        self, recorder: Recorder, progress: Progress, memory: tuple[float | None, float | None]
    ) -> TrainResult:
        highest = peak_memory_mb(self.policy.device)
        restored = self._restore_best(recorder, progress)
        # Saved first: whatever the evaluation meets, the training is not lost.
        self._save()
        after = recorder.evaluated(restored or progress.step, answer=True)
        result = self._result(progress, recorder.before, after, highest, restored)
        result = dataclasses.replace(result, predicted_memory_mb=memory[0], measured_memory_mb=memory[1])
        if self.processes.main:
            write_json(self.run_dir / SUMMARY, as_json(result))
        hooks(self.processes).after_train(result=result)
        return result

    def _loop(self, recorder: Recorder, progress: Progress, watch: Watch) -> Loop:
        plan = Plan(
            total_steps=recorder.total_steps,
            pack_tokens=self.config.pack_tokens,
            clip_norm=self.config.clip_norm,
            log_every=self.config.log_every,
            evaluate_every=self.config.evaluation.every if self.evaluator else 0,
            patience=self.config.evaluation.patience,
            keep_best=self.config.evaluation.restore_best,
            skips_non_finite=self.optimiser.skips_non_finite,
        )
        state = recorder.state
        state.optimiser.register_step_pre_hook(lambda *_: watch.look(0))  # all gradients are there
        largest = max((p for p in self.loaded.model.parameters() if p.requires_grad), key=lambda p: p.numel())
        largest.register_hook(lambda _: watch.look(0))  # and here both, which may be more
        objective = Watched(self.objective, watch)
        return Loop(
            self.policy, objective, self.batches, state.optimiser, state.schedule, plan, recorder, progress,
            self.processes,
        )  # fmt: skip

    def _recorder(self, total_steps: int) -> Recorder:
        trained = [(name, p) for name, p in self.loaded.model.named_parameters() if p.requires_grad]
        optimiser = self.optimiser.build(trained)
        lr_schedule = schedule(self.config.schedule, optimiser, total_steps)
        state = TrainingState(self.loaded.model, optimiser, lr_schedule, self.processes)
        return Recorder(
            self.config, self.run_dir, self.data, self.evaluator, state, self.processes, total_steps
        )

    def _checkpoint(self, checkpoints: Checkpoints, total_steps: int) -> Checkpoint | None:
        """Return what to go on from; every process takes the main one's choice."""
        if not self.config.resume:
            return None
        found = checkpoints.newest() if self.processes.main else None
        step, lost = self.processes.same((found.step if found else None, bool(checkpoints.steps())))
        if step is None and (lost or (self.run_dir / SUMMARY).exists()):
            raise ConfigError(
                f"{self.run_dir} holds no whole checkpoint to go on from; start a new run in another run_dir"
            )
        if step is None:
            if self.config.resume != "auto":
                log.warning("%s holds no checkpoint: the run starts anew", self.run_dir)
            return None
        if step > total_steps:
            raise ConfigError(
                f"{self.run_dir} has {step} steps behind it; max_steps or epochs ask for {total_steps}, "
                "expected at least as many"
            )
        return Checkpoint(checkpoints.folder(step), step)

    def _restore_best(self, recorder: Recorder, progress: Progress) -> int | None:
        best = progress.best_step
        if not (self.config.evaluation.restore_best and best) or best == progress.step:
            return None
        recorder.state.restore_weights(recorder.checkpoints.at(best).load().tensors["weights"])
        return best

    def _save(self) -> None:
        model = self.processes.gather_into(self.twin, self.loaded.model)
        if self.processes.main:
            self.adapter.save(model, self.run_dir / "model", self.loaded.name)
            self.loaded.tokenizer.save_pretrained(self.run_dir / "model")
        self.processes.gather(None)  # nobody goes on before it is written

    def _result(
        self,
        progress: Progress,
        before: EvaluationReport | None,
        after: EvaluationReport | None,
        highest: float,
        restored: int | None,
    ) -> TrainResult:
        trained, total = parameter_counts(self.loaded.model)
        assert progress.first_loss is not None
        return TrainResult(
            run_dir=self.run_dir,
            model_dir=self.run_dir / "model",
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
