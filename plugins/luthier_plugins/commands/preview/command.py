"""The command `preview` and its options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from luthier import Command, Register, hookimpl, option
from luthier.commands import TRAIN_DEFAULTS, TrainConfig


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


@dataclass(frozen=True)
class Preview(Command):
    """Show what a training command would train on: see `PreviewConfig`."""

    summary: ClassVar[str] = "the first examples as the model will see them, what is trained marked"
    examples: ClassVar[Sequence[str]] = ("preview model.path=FOLDER data=jsonl data.path=rows.jsonl",)
    options: ClassVar[type[Any]] = PreviewConfig
    defaults: ClassVar[Mapping[str, Any]] = TRAIN_DEFAULTS
    multirun: ClassVar[str | None] = "shows what one config trains on"
    loads_weights: ClassVar[bool] = False

    def check(self, config: Any) -> None:
        """See `Command.check`."""
        from luthier.commands import check_positive, check_training

        check_positive(config, "examples")
        check_training(config)

    def run(self, config: Any) -> Any:
        """Show, and return a `PreviewResult`."""
        from luthier_plugins.commands.preview.previewing import preview

        return preview(config)


@hookimpl
def register_commands(register: Register) -> None:
    """Register `preview`."""
    register("preview", Preview)
