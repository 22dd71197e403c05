"""The options of `train` and `evaluate` that belong to no method."""

from dataclasses import dataclass, field
from typing import Any

from luthier.config import ModelConfig
from luthier.contracts import option
from luthier.engine import ScheduleConfig
from luthier.evaluation import EvaluationConfig, ReferenceConfig
from luthier.runs import CheckpointConfig, PluginsConfig

OVERFLOW = "What becomes of longer ones: drop, truncate_left, truncate_right, refuse."
UNUSABLE = "What becomes of rows that teach nothing, e.g. chosen equal to rejected: drop, refuse."

TRAIN_DEFAULTS: dict[str, Any] = {
    "model": None, "quantiser": None, "adapter": "lora", "optimiser": "adamw", "objective": "sft",
    "data": "???", "data@eval_data": None, "row_filter": [], "reward_model": [],
    "tracker": ["progress", "metrics"], "recipe": None,
}  # fmt: skip
"""What `train` chooses where nobody does, and every command that takes its options."""


@dataclass
class TrainConfig:
    """Fine-tune: model × quantiser × adapter × optimiser × objective × data."""

    model: ModelConfig = field(default_factory=ModelConfig)
    quantiser: Any = None
    adapter: Any = "???"
    optimiser: Any = "???"
    objective: Any = "???"
    data: Any = "???"
    eval_data: Any = None
    row_filters: dict[str, Any] = field(default_factory=dict)
    reward_models: dict[str, Any] = field(default_factory=dict)
    trackers: dict[str, Any] = field(default_factory=dict)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    auxiliary: dict[str, Any] = option(
        {},
        "Further objectives on the first completion of every row, by weight, e.g. auxiliary.sft=0.2.",
        was="also",
    )
    stages: dict[str, str] = option(
        {},
        "Earlier stages: commands that must be done first, by name; those that are done are left out.",
        was="before",
    )
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    plugins: PluginsConfig = field(default_factory=PluginsConfig)
    batch_size: int = option(16, "Examples per optimiser step, over all processes.")
    pack_tokens: int = option(
        2048, "Tokens one forward pass may hold: the memory knob. Only dropout masks change."
    )
    epochs: float = option(1.0, "Passes over the data.")
    max_steps: int | None = option(None, "Optimiser steps; null: as many as `epochs` says.")
    max_length: int | None = option(None, "Longest example in tokens; null: the model's context.")
    overflow: str = option("drop", OVERFLOW)
    unusable: str = option("drop", UNUSABLE)
    max_grad_norm: float | None = option(
        1.0, "Largest global gradient norm; null: no clipping.", was="clip_norm"
    )
    shuffle: bool = option(True, "Draw a new order of the examples every epoch.")
    seed: int = option(0, "Seed of the order, the adapter's start and dropout.")
    log_every: int = option(5, "Optimiser steps between two lines of metrics.jsonl.")
    run_dir: str = option("runs/${now:%Y-%m-%d_%H-%M-%S}", "Folder of the run: config, metrics, result.")
    resume: str | None = option(
        None, "A run folder: continue that run as it was; auto: continue what run_dir holds, if anything."
    )


@dataclass
class EvaluateConfig:
    """Measure a model on held-out rows: loss, perplexity, verified answers."""

    model: ModelConfig = field(default_factory=ModelConfig)
    quantiser: Any = None
    objective: Any = "???"
    data: Any = "???"
    row_filters: dict[str, Any] = field(default_factory=dict)
    trackers: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    plugins: PluginsConfig = field(default_factory=PluginsConfig)
    pack_tokens: int = option(2048, "Tokens one forward pass may hold.")
    max_length: int | None = option(None, "Longest example in tokens; null: the model's context.")
    overflow: str = option("drop", OVERFLOW)
    unusable: str = option("drop", UNUSABLE)
    seed: int = option(0, "Seed of everything random.")
    run_dir: str = option("runs/${now:%Y-%m-%d_%H-%M-%S}", "Folder for config, answers and summary.")
