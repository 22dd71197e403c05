"""The command `sample` and its options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from luthier import Command, Register, hookimpl, option
from luthier.config import ModelConfig
from luthier.runs import PluginsConfig


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
    selector: Any = "???"
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


@dataclass(frozen=True)
class Sample(Command):
    """Sample answers to prompts: see `SampleConfig`."""

    summary: ClassVar[str] = "answers to prompts, scored: as candidates, preference pairs or rows to train on"
    examples: ClassVar[Sequence[str]] = (
        "sample RUN prompt='What is 7 + 12?' n=4",
        "sample RUN data=jsonl data.path=prompts.jsonl reward_model=[length] write=pairs out=pairs.jsonl",
    )
    options: ClassVar[type[Any]] = SampleConfig
    defaults: ClassVar[Mapping[str, Any]] = {
        "model": None,
        "quantiser": None,
        "data": None,
        "row_filter": [],
        "reward_model": [],
        "selector": "best_of_n",
    }
    positionals: ClassVar[tuple[str, ...]] = ("model.path",)
    multirun: ClassVar[str | None] = "writes one file"

    def check(self, config: Any) -> None:
        """See `Command.check`."""
        from luthier.commands import check_positive

        check_positive(config, "batch_size", "pack_tokens")

    def run(self, config: Any) -> Any:
        """Sample, and return a `SampleResult`."""
        from luthier_plugins.commands.sample.sampling import sample

        return sample(config)


@hookimpl
def register_commands(register: Register) -> None:
    """Register `sample`."""
    register("sample", Sample)
