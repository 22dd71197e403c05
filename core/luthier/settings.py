"""The options that belong to no method: one dataclass a verb, which is schema and help text at once."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from luthier.method import option
from luthier.model import ModelConfig


@dataclass
class ScheduleConfig:
    """The learning-rate schedule, from transformers."""

    name: str = option("cosine", "A schedule of transformers: constant, linear, cosine, polynomial …")
    warmup: float = option(0.03, "Warm-up: a share of all steps if below 1, else a number of steps.")


@dataclass
class EvaluationConfig:
    """What is measured on the held-out rows (`eval_data`)."""

    every: int = option(0, "Evaluate the loss every so many steps; 0: only before and after training.")
    generate: bool = option(True, "Answer the held-out prompts and count the answers that are right.")
    max_new_tokens: int = option(64, "Tokens an answer may have.")
    batch_size: int = option(32, "Prompts answered at a time.")
    samples: int = option(3, "Answers shown before and after training.")


@dataclass
class PluginsConfig:
    """What a run expects of the installed plugins."""

    required: list[str] = option([], "Requirements that must be met, e.g. 'luthier-toy>=0.2'.")


@dataclass
class TrainConfig:
    """Fine-tune: model × quantiser × adapter × optimiser × objective × data."""

    model: ModelConfig = field(default_factory=ModelConfig)
    quantiser: Any = None
    adapter: Any = MISSING
    optimiser: Any = MISSING
    objective: Any = MISSING
    data: Any = MISSING
    eval_data: Any = None
    trackers: dict[str, Any] = field(default_factory=dict)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    plugins: PluginsConfig = field(default_factory=PluginsConfig)
    batch_size: int = option(16, "Examples per optimiser step, over all processes.")
    pack_tokens: int = option(
        2048, "Tokens one forward pass may hold: the memory knob. Only dropout masks change."
    )
    epochs: float = option(1.0, "Passes over the data.")
    max_steps: int | None = option(None, "Optimiser steps; null: as many as `epochs` says.")
    max_length: int | None = option(None, "Longest example in tokens; longer ones are dropped and counted.")
    clip_norm: float | None = option(1.0, "Largest global gradient norm; null: no clipping.")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: less memory.")
    shuffle: bool = option(True, "Draw a new order of the examples every epoch.")
    seed: int = option(0, "Seed of the order, the adapter's start and dropout.")
    log_every: int = option(5, "Optimiser steps between two lines of metrics.jsonl.")
    run_dir: str = option("runs/${now:%Y-%m-%d_%H-%M-%S}", "Folder of the run: config, metrics, result.")


@dataclass
class EvaluateConfig:
    """Measure a model on held-out rows: loss, perplexity, verified answers."""

    model: ModelConfig = field(default_factory=ModelConfig)
    objective: Any = MISSING
    data: Any = MISSING
    trackers: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    plugins: PluginsConfig = field(default_factory=PluginsConfig)
    pack_tokens: int = option(2048, "Tokens one forward pass may hold.")
    max_length: int | None = option(None, "Longest example in tokens; longer ones are dropped and counted.")
    seed: int = option(0, "Seed of everything random.")
    run_dir: str = option("runs/${now:%Y-%m-%d_%H-%M-%S}", "Folder for config, answers and summary.")


VERBS: dict[str, type[Any]] = {"train": TrainConfig, "evaluate": EvaluateConfig}
