"""What a run says about itself: typed records, the summary."""

from __future__ import annotations

import dataclasses
import functools
import json
import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StepReport:
    """One logging point; averages are over the steps since the last one.

    Attributes:
        step: Optimiser steps done.
        total_steps: Optimiser steps planned.
        epoch: Passes over the data done, fractional.
        loss: Loss, normalised over the examples of those steps.
        metrics: The objective's own metrics, normalised likewise.
        learning_rate: Of the first parameter group.
        grad_norm: Global gradient norm before clipping, at the last step.
        tokens: Tokens processed so far, padding not counted.
        tokens_per_second: Over the steps since the last logging point.
        memory_mb: Peak memory: of the accelerator, or of the process on CPU.
        seconds: Training time so far.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float
    metrics: dict[str, float]
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    memory_mb: float
    seconds: float


@dataclass(frozen=True)
class Sample:
    """A held-out prompt, the model's answer, and what the source says of it."""

    origin: str
    prompt: str
    answer: str
    expected: str
    score: float | None


@dataclass(frozen=True)
class EvaluationReport:
    """Held-out quality at one moment.

    Attributes:
        step: Optimiser steps done.
        loss: Mean objective loss over the held-out rows.
        perplexity: ``exp`` of the mean negative log-likelihood of a supervised token; None of scores.
        accuracy: Share of the prompts answered right, or None where nothing was generated or verified.
        rows: Held-out rows.
        scored: Answers that were verified; `accuracy` is a share of them.
        samples: The answers, in the order of the rows.
        metrics: The objective's other metrics over the held-out rows.
    """

    step: int
    loss: float
    perplexity: float | None
    accuracy: float | None
    rows: int
    scored: int = 0
    samples: list[Sample] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns, and ``summary.json`` holds.

    Attributes:
        run_dir: The run folder.
        model_dir: Where the adapter or the full model is, in the field's formats.
        steps: Optimiser steps done; fewer than planned where patience ended.
        first_loss: Loss of the first optimiser step.
        last_loss: Loss at the last logging point.
        before: Held-out quality before training, or None without `eval_data`.
        after: Held-out quality after training, or None without `eval_data`.
        trainable_parameters: Parameters that trained.
        total_parameters: Parameters of the model, adapter included.
        tokens: Tokens trained on.
        tokens_per_second: Over the whole of training, evaluation not counted.
        seconds: Training time.
        peak_memory_mb: Peak memory: of the accelerator, or of the process on CPU.
        versions: Versions that ran.
        restored_step: The step whose weights were kept (evaluation.restore_best); None: the last one.
        predicted_memory_mb: What was planned for the steps before the first; None where it could not be.
        measured_memory_mb: The most in use during the steps; None where the system does not say.
    """

    run_dir: Path
    model_dir: Path
    steps: int
    first_loss: float
    last_loss: float
    before: EvaluationReport | None
    after: EvaluationReport | None
    trainable_parameters: int
    total_parameters: int
    tokens: int
    tokens_per_second: float
    seconds: float
    peak_memory_mb: float
    versions: dict[str, str]
    restored_step: int | None = None
    predicted_memory_mb: float | None = None
    measured_memory_mb: float | None = None


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions a result depends on."""
    packages = ("luthier", "torch", "transformers", "safetensors", "pluggy", "hydra-core", "omegaconf")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def evaluation_of(plain: dict[str, Any] | None) -> EvaluationReport | None:
    """Return the evaluation that `as_json` made `plain` of."""
    if plain is None:
        return None
    return EvaluationReport(**{**plain, "samples": [Sample(**sample) for sample in plain["samples"]]})


def result_of(plain: dict[str, Any]) -> TrainResult:
    """Return the result that a ``summary.json`` holds."""
    folders = {name: Path(plain[name]) for name in ("run_dir", "model_dir")}
    reports = {name: evaluation_of(plain[name]) for name in ("before", "after")}
    return TrainResult(**{**plain, **folders, **reports})


def as_json(record: Any) -> dict[str, Any]:
    """Return a record as plain JSON values; paths become text."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(record), default=str))
    return plain


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write `record` to `path`, indented; the file is replaced whole or not at all."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(path)
