"""The command `merge` and its options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any, ClassVar

from luthier import Command, Register, hookimpl, option
from luthier.runs import PluginsConfig


@dataclass
class ScoringConfig:
    """How the held-out tasks of a merge are answered."""

    generate: bool = option(True, "Answer the held-out prompts and count the answers that are right.")
    max_new_tokens: int = option(64, "Tokens an answer may have.")
    batch_size: int = option(32, "Prompts answered at a time.")


@dataclass
class MergeConfig:
    """Merge several models, or adapters, into one: tensor by tensor, in the memory that is allowed.

    Models are transformers folders, hub names, runs of Luthier and PEFT adapters. The same options and models
    give the same bytes, whatever the shards, threads and memory. A merge that was interrupted goes on with
    ``resume=auto``. Held-out tasks to score with: ``+data@tasks.NAME=SOURCE tasks.NAME.OPTION=…``.
    """

    models: Any = option("???", "'[FOLDER, FOLDER]', or with names 'models={one: FOLDER, two: FOLDER}'.")
    base: str | None = option(
        None, "The model they were tuned from, where the merger needs it; null: the adapters' own."
    )
    merger: Any = "???"
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


@dataclass(frozen=True)
class Merge(Command):
    """Merge models or adapters: see `MergeConfig`."""

    summary: ClassVar[str] = (
        "several models or adapters as one: soup, task arithmetic, TIES, DARE, in bounded memory"
    )
    examples: ClassVar[Sequence[str]] = (
        "merge RUN RUN merger=soup run_dir=runs/merged",
        "merge 'models={sums: RUN, words: RUN}' merger=ties base=FOLDER run_dir=runs/merged",
    )
    options: ClassVar[type[Any]] = MergeConfig
    defaults: ClassVar[Mapping[str, Any]] = {"merger": "???", "recipe": None}
    positionals: ClassVar[tuple[str | EllipsisType, ...]] = ("models", ...)

    def check(self, config: Any) -> None:
        """See `Command.check`."""
        from luthier.commands import check_evaluation, check_positive

        check_positive(config, "pack_tokens")
        check_evaluation(config)

    def run(self, config: Any) -> Any:
        """Merge, and return a `MergeReport`."""
        from luthier_plugins.commands.merge.run.merging import merge

        return merge(config)


@hookimpl
def register_commands(register: Register) -> None:
    """Register `merge`."""
    register("merge", Merge)
