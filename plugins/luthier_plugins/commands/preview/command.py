"""The command `preview` and its options."""

from dataclasses import dataclass

from omegaconf import DictConfig

from luthier.commands import TrainConfig, check_positive, check_training
from luthier.contracts import Command, option


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


def _check(config: DictConfig) -> None:
    check_positive(config, "examples")
    check_training(config)


COMMAND = Command(
    "luthier_plugins.commands.preview.previewing:preview",
    PreviewConfig,
    multirun="shows what one config trains on",
    loads_weights=False,
    check=_check,
)
