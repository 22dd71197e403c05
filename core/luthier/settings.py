"""The options that belong to no method: one dataclass a verb, which is schema and help text at once."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from luthier.method import option
from luthier.model_config import ModelConfig, ModelPlace


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
    patience: int | None = option(None, "Stop after so many evaluations without a lower loss; null: never.")
    restore_best: bool = option(False, "Keep the weights of the evaluation with the lowest loss.")


@dataclass
class ScoringConfig:
    """How the held-out tasks of a merge are answered."""

    generate: bool = option(True, "Answer the held-out prompts and count the answers that are right.")
    max_new_tokens: int = option(64, "Tokens an answer may have.")
    batch_size: int = option(32, "Prompts answered at a time.")


@dataclass
class ReferenceConfig:
    """What an objective with a reference (dpo, ipo, kto) compares with; measured once, before training."""

    model: str | None = option(
        None, "Another checkpoint or adapter folder; null: this model as it is before the first step."
    )
    memory: str | None = option(
        None, "Folder where what it gives is remembered, for other runs too; null: the run folder."
    )


@dataclass
class CheckpointConfig:
    """When checkpoints are saved; every run saves one when it is stopped by Ctrl-C or SIGTERM."""

    every: int | None = option(None, "Steps between checkpoints; null: by time; 0: only when stopped.")
    minutes: float = option(10.0, "Minutes between checkpoints where `every` is null; the last step has one.")
    keep: int = option(2, "Checkpoints that stay; the best one (evaluation.restore_best) stays besides.")


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
    row_filters: dict[str, Any] = field(default_factory=dict)
    reward_models: dict[str, Any] = field(default_factory=dict)
    trackers: dict[str, Any] = field(default_factory=dict)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    also: dict[str, Any] = option(
        {}, "Further objectives on the first completion of every row, by weight, e.g. also.sft=0.2."
    )
    before: dict[str, Any] = option(
        {}, "Earlier stages: commands that must be done first, by name; those that are done are left out."
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
    overflow: str = option(
        "drop", "What becomes of longer ones: drop, truncate_left, truncate_right, refuse."
    )
    unusable: str = option(
        "drop", "What becomes of rows that teach nothing, e.g. chosen equal to rejected: drop, refuse."
    )
    clip_norm: float | None = option(1.0, "Largest global gradient norm; null: no clipping.")
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
    objective: Any = MISSING
    data: Any = MISSING
    row_filters: dict[str, Any] = field(default_factory=dict)
    trackers: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    plugins: PluginsConfig = field(default_factory=PluginsConfig)
    pack_tokens: int = option(2048, "Tokens one forward pass may hold.")
    max_length: int | None = option(None, "Longest example in tokens; null: the model's context.")
    overflow: str = option(
        "drop", "What becomes of longer ones: drop, truncate_left, truncate_right, refuse."
    )
    unusable: str = option(
        "drop", "What becomes of rows that teach nothing, e.g. chosen equal to rejected: drop, refuse."
    )
    seed: int = option(0, "Seed of everything random.")
    run_dir: str = option("runs/${now:%Y-%m-%d_%H-%M-%S}", "Folder for config, answers and summary.")


@dataclass
class SampleConfig:
    """Sample answers to prompts, score them, and choose among them: best-of-N or a majority vote.

    Prompts are those of `data`, or ``prompt='…'``. Scores come from `reward_model`; without one, from the
    rows' source, which says what is right. Writes JSON Lines: every answer with its scores, pairs of a better
    and a worse answer for preference training, or the chosen answers as rows for supervised training. A run
    that was stopped goes on when the command is repeated.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    quantiser: Any = None
    data: Any = None
    row_filters: dict[str, Any] = field(default_factory=dict)
    reward_models: dict[str, Any] = field(default_factory=dict)
    selector: Any = MISSING
    plugins: PluginsConfig = field(default_factory=PluginsConfig)
    prompt: Any = option(None, "A prompt, or a list of them, instead of data; the answers are shown.")
    out: str | None = option(None, "File to write, JSON Lines; a new one.")
    write: str = option("candidates", "What is written: candidates, pairs or rows.")
    n: int = option(8, "Answers to each prompt.")
    temperature: float = option(1.0, "Temperature of sampling; lower is less varied.")
    top_p: float = option(1.0, "Share of the probability that sampling keeps.")
    max_new_tokens: int = option(64, "Tokens an answer may have.")
    batch_size: int = option(64, "Answers made at a time.")
    pack_tokens: int = option(4096, "Tokens one forward pass of a reward model may hold.")
    min_score: float | None = option(
        None,
        "Least score of a row's answer and of a pair's chosen side, which the rejected one stays below; "
        "null: 1 where the rows' source verifies, else any.",
    )
    pairs_each: int = option(1, "Most pairs of one prompt.")
    gold: bool = option(False, "Take a row's own completion where no answer is good enough.")
    picture: str | None = option(None, "Draw the chosen answer's score against N: .png or .svg.")
    seed: int = option(0, "Seed of sampling.")


@dataclass
class FoldModelConfig(ModelPlace):
    """The adapter to fold, and its base."""

    dtype: str = option(
        "auto", "What a quantised base computes in; auto: as in the run that trained the adapter."
    )


@dataclass
class FoldConfig:
    """Fold an adapter into its base: one plain model in transformers' layout, which loads anywhere.

    Every layer is folded in fp32 and rounded once; what that loses is shown, and kept in ``fold.json``.
    """

    model: FoldModelConfig = field(default_factory=FoldModelConfig)
    quantiser: Any = None
    base: str = option(
        "original",
        "What the update is added to: original, the checkpoint's own weights; dequantised, those that "
        "`quantiser` makes of them, which training saw.",
    )
    out: str = option(MISSING, "Folder to write the model to; a new or an empty one.")
    dtype: str = option("bfloat16", "What is written: float32, bfloat16 or float16.")
    plugins: PluginsConfig = field(default_factory=PluginsConfig)


@dataclass
class MergeConfig:
    """Merge several models, or adapters, into one: tensor by tensor, in the memory that is allowed.

    Models are transformers folders, hub names, runs of Luthier and PEFT adapters. The same options and models
    give the same bytes, whatever the shards, threads and memory. A merge that was interrupted goes on with
    ``resume=auto``. Held-out tasks to score with: ``+data@tasks.NAME=SOURCE tasks.NAME.OPTION=…``.
    """

    models: Any = option(MISSING, "'[FOLDER, FOLDER]', or with names 'models={one: FOLDER, two: FOLDER}'.")
    base: str | None = option(
        None, "The model they were tuned from, where the merger needs it; null: the adapters' own."
    )
    merger: Any = MISSING
    result: str = option("model", "model, or with adapters as models: adapter.")
    rank: int | None = option(None, "Rank of the adapter; null: as high as makes it exact.")
    dtype: str = option("auto", "What is written: float32, bfloat16, float16; auto: the widest there is.")
    missing: str = option(
        "refuse",
        "Tensors that not all models have: refuse, present (merge those there are), base (take the base's).",
    )
    check: str = option(
        "read",
        "Of the result: read (its bytes back), or load (by transformers, and run; it must fit max_memory).",
    )
    max_memory: float = option(2.0, "GiB of memory that no file stands behind, the program's own included.")
    threads: int | None = option(None, "Tensors merged at a time; null: as many as torch uses threads.")
    shard_gb: float = option(5.0, "Largest file in GB (10⁹ bytes).")
    greedy: bool = option(
        False,
        "Begin with the model that scores best on `tasks`, and add another only if the score does not drop.",
    )
    tasks: dict[str, Any] = option(
        {}, "Held-out tasks by name: data sources, e.g. +data@tasks.sums=sums_held_out."
    )
    evaluation: ScoringConfig = field(default_factory=ScoringConfig)
    plugins: PluginsConfig = field(default_factory=PluginsConfig)
    pack_tokens: int = option(2048, "Tokens one forward pass of the scoring may hold.")
    run_dir: str = option(
        "runs/${now:%Y-%m-%d_%H-%M-%S}", "Folder: config, summary, and the result in model/."
    )
    resume: str | None = option(None, "auto: go on with what run_dir holds of this merge, if anything.")


@dataclass
class PreviewConfig(TrainConfig):
    """Show the first examples as the model will see them: token by token, the trained ones marked.

    Takes the options of ``train``: put ``preview`` in its place and see what that command would train on.
    Only the tokenizer is loaded.
    """

    examples: int = option(3, "How many to show: the first ones, or with `pick_seed` a draw.")
    rows: list[int] = option([], "Show these instead: places among the rows that are used, from 1.")
    pick_seed: int | None = option(None, "Draw the examples at random with this seed.")
    html: str | None = option("preview.html", "The page to write; null: none.")


@dataclass
class PlanConfig(TrainConfig):
    """Say what a run takes and what fits, from the model's shapes: no weight is downloaded or loaded.

    Takes the options of ``train``: put ``plan`` in its place. No rows are needed: a pack is one row of
    `pack_tokens` tokens, all of them supervised, and a step has several packs. For another machine than this
    one: ``model.device=cuda memory_gb=48 tflops=300``.
    """

    data: Any = None
    memory_gb: float | None = option(None, "Memory of the device in GB (10⁹ bytes); null: this machine's.")
    tflops: float | None = option(None, "Speed of the device in TFLOP/s; null: a product is timed here.")
    efficiency: float = option(0.5, "Share of that speed that training reaches.")
    tokens: float | None = option(None, "Tokens to train on; null: a pack for each of max_steps; a million.")
    json: str | None = option(None, "A file to write the plan to.")


WITHOUT_WEIGHTS = ("preview", "plan")
"""The verbs that load none, so that a method may be asked about on a machine it does not run on."""

VERBS: dict[str, type[Any]] = {
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "sample": SampleConfig,
    "fold": FoldConfig,
    "merge": MergeConfig,
    "preview": PreviewConfig,
    "plan": PlanConfig,
}
