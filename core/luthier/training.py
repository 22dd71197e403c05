"""`train` and `evaluate`: from a composed config to a result, each step one line."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from luthier import config as configs
from luthier import engine
from luthier.adapter import Adapter
from luthier.catalogue import catalogue
from luthier.codec import Codec
from luthier.data import Encoded, Sampler, encode
from luthier.data_source import DataSource
from luthier.errors import ConfigError
from luthier.evaluation import Evaluator
from luthier.fused import fuse
from luthier.header import header, model_line, parameter_counts
from luthier.model import LoadedModel, load_model
from luthier.objective import Objective
from luthier.policy import Policy
from luthier.report import (
    EvaluationReport,
    StepReport,
    TrainResult,
    append_line,
    as_json,
    peak_memory_mb,
    versions,
    write_json,
)
from luthier.schedule import schedule
from luthier.settings import EvaluationConfig


def train(config: DictConfig) -> TrainResult:
    """Fine-tune as `config` says and leave a run folder.

    Args:
        config: What `luthier.compose("train", overrides)` returns.

    Raises:
        LuthierError: Something a person can mend; one line says what, where and how.
    """
    with _run(config) as run_dir:
        return _Training.prepare(config, run_dir).go()


def evaluate(config: DictConfig) -> EvaluationReport:
    """Measure a model on the rows of `config.data`, and leave answers and summary in the run folder.

    Raises:
        LuthierError: Something a person can mend; one line says what, where and how.
    """
    with _run(config) as run_dir:
        loaded = load_model(config.model, train_base=False)
        if config.model.fused:
            fuse(loaded.model)
        objective: Objective = configs.build("objective", config.objective)
        held_out = _held_out(config, "data", loaded, objective)
        evaluator = _evaluator(config, _policy(loaded), loaded, objective, *held_out)
        hook = catalogue().hooks.hook
        hook.after_header(lines=[model_line(loaded), f"data      {evaluator.held_out.summary()}"])
        report = evaluator.report(step=0, answer=True)
        hook.after_evaluation(report=report)
        write_json(run_dir / "summary.json", {**as_json(report), "versions": versions()})
        return report


@dataclass(frozen=True)
class _Training:
    """Everything a training run holds; `go` is its story."""

    config: DictConfig
    run_dir: Path
    loaded: LoadedModel
    adapter: Adapter
    objective: Objective
    policy: Policy
    data: Encoded
    evaluator: Evaluator | None

    @classmethod
    def prepare(cls, config: DictConfig, run_dir: Path) -> _Training:
        """Build every method, load the model, attach the adapter, encode the data."""
        torch.manual_seed(config.seed)
        adapter: Adapter = configs.build("adapter", config.adapter)
        objective: Objective = configs.build("objective", config.objective)
        source: DataSource = configs.build("data_source", config.data)
        quantiser = configs.build("quantiser", config.quantiser) if config.quantiser else None
        load_options = quantiser.load_options if quantiser else None
        loaded = load_model(config.model, train_base=adapter.trains_base, load_options=load_options)
        data = encode(source, objective, Codec(loaded.tokenizer), _max_length(config, loaded))
        held_out = _held_out(config, "eval_data", loaded, objective) if config.eval_data else None
        if held_out:
            data = data.without(held_out[1])
            if not len(data):
                raise ConfigError("every row of data is also in eval_data: nothing is left to train on")
        adapter.attach(loaded.model, torch.Generator().manual_seed(config.seed))
        if config.gradient_checkpointing:
            loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.model.fused:
            fuse(loaded.model)
        # After the adapter, which may have changed the output head that the policy looks at.
        policy = _policy(loaded)
        evaluator = _evaluator(config, policy, loaded, objective, *held_out) if held_out else None
        catalogue().hooks.hook.after_model_prepared(model=loaded.model, config=config)
        return cls(config, run_dir, loaded, adapter, objective, policy, data, evaluator)

    def go(self) -> TrainResult:
        """Evaluate, train, evaluate, save, read back, sum up."""
        hook = catalogue().hooks.hook
        total_steps, sampler = self._steps()
        held_out = self.evaluator.held_out if self.evaluator else None
        trained = [(name, p) for name, p in self.loaded.model.named_parameters() if p.requires_grad]
        optimiser = configs.build("optimiser", self.config.optimiser).build(trained)
        lr_schedule = schedule(self.config.schedule, optimiser, total_steps)
        hook.after_header(lines=header(self.config, self.loaded, self.data, held_out, total_steps))
        before = self._evaluate(0, answer=True)
        hook.before_train(run_dir=self.run_dir, config=self.config, total_steps=total_steps, start_step=0)
        reports: list[StepReport] = []

        def on_log(report: StepReport) -> None:
            reports.append(report)
            append_line(self.run_dir / "metrics.jsonl", as_json(report))
            hook.after_step(report=report)

        plan = engine.Plan(
            total_steps=total_steps,
            pack_tokens=self.config.pack_tokens,
            clip_norm=self.config.clip_norm,
            log_every=self.config.log_every,
            evaluate_every=self.config.evaluation.every if self.evaluator else 0,
        )
        engine.run(
            self.policy, self.objective, self.data.trees, sampler, optimiser, lr_schedule, plan,
            on_log, lambda step: self._evaluate(step, answer=False),
        )  # fmt: skip
        peak = peak_memory_mb(self.policy.device)
        # Saved first: whatever the evaluation meets, the training is not lost.
        self.adapter.save(self.loaded.model, self.run_dir / "model", self.loaded.name)
        self.loaded.tokenizer.save_pretrained(self.run_dir / "model")
        after = self._evaluate(total_steps, answer=True)
        result = self._result(reports, before, after, peak)
        write_json(self.run_dir / "summary.json", as_json(result))
        hook.after_train(result=result)
        return result

    def _steps(self) -> tuple[int, Sampler]:
        config = self.config
        sampler = Sampler(len(self.data), config.batch_size, config.shuffle, config.seed)
        if not 0 < config.epochs < math.inf:
            raise ConfigError(f"epochs={config.epochs} must be positive: no step to train")
        return config.max_steps or math.ceil(config.epochs * sampler.steps_per_epoch), sampler

    def _evaluate(self, step: int, answer: bool) -> EvaluationReport | None:
        if self.evaluator is None:
            return None
        report = self.evaluator.report(step, answer)
        append_line(self.run_dir / "evaluations.jsonl", as_json(report))
        catalogue().hooks.hook.after_evaluation(report=report)
        return report

    def _result(
        self,
        reports: list[StepReport],
        before: EvaluationReport | None,
        after: EvaluationReport | None,
        peak: float,
    ) -> TrainResult:
        last = reports[-1]
        trained, total = parameter_counts(self.loaded.model)
        return TrainResult(
            run_dir=self.run_dir,
            model_dir=self.run_dir / "model",
            steps=last.step,
            first_loss=reports[0].loss,
            last_loss=last.loss,
            before=before,
            after=after,
            trainable_parameters=trained,
            total_parameters=total,
            tokens=last.tokens,
            tokens_per_second=last.tokens / last.seconds,
            seconds=last.seconds,
            peak_memory_mb=peak,
            versions=versions(),
        )


def _policy(loaded: LoadedModel) -> Policy:
    policy = Policy(loaded.model, autocast_dtype=loaded.autocast_dtype)
    policy.check()
    return policy


def _max_length(config: DictConfig, loaded: LoadedModel) -> int:
    context = loaded.context
    if config.max_length and context and config.max_length > context:
        raise ConfigError(f"max_length={config.max_length} is more than the model's context, {context}")
    return int(config.max_length or context or 2**20)


def _held_out(
    config: DictConfig, key: str, loaded: LoadedModel, objective: Objective
) -> tuple[DataSource, Encoded]:
    source: DataSource = configs.build("data_source", config[key])
    return source, encode(source, objective, Codec(loaded.tokenizer), _max_length(config, loaded))


def _evaluator(
    config: DictConfig,
    policy: Policy,
    loaded: LoadedModel,
    objective: Objective,
    source: DataSource,
    held_out: Encoded,
) -> Evaluator:
    values: Any = OmegaConf.to_container(config.evaluation)
    settings = EvaluationConfig(**values)
    codec = Codec(loaded.tokenizer)
    return Evaluator(policy, objective, codec, source, held_out, settings, config.pack_tokens)


@contextlib.contextmanager
def _run(config: DictConfig) -> Iterator[Path]:
    """Open the run folder, register the configured trackers for its duration, report what ends it."""
    run_dir = Path(config.run_dir)
    if not config.run_dir or any((run_dir / name).exists() for name in ("config.yaml", "model")):
        raise ConfigError(f"run_dir={config.run_dir} holds a run or a model already; choose another folder")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, run_dir / "config.yaml", resolve=True)
    except OSError as error:
        raise ConfigError(f"run_dir={config.run_dir} cannot be written: {error.strerror}") from error
    hooks = catalogue().hooks
    trackers = [configs.build("tracker", node) for node in (config.get("trackers") or {}).values()]
    for tracker in trackers:
        hooks.register(tracker)
    try:
        hooks.hook.after_config_composed(config=config)
        yield run_dir
    except BaseException as error:
        hooks.hook.on_train_error(error=error)
        _clear(run_dir)
        raise
    finally:
        for tracker in trackers:
            hooks.unregister(tracker)


def _clear(run_dir: Path) -> None:
    """Leave no folder of a run that measured nothing, so that the mended command can use its name."""
    if not any((run_dir / name).exists() for name in ("metrics.jsonl", "evaluations.jsonl")):
        (run_dir / "config.yaml").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            run_dir.rmdir()
