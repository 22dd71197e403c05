"""The command `train`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from luthier import Register, hookimpl
from luthier.commands.options import TRAIN_DEFAULTS, TrainConfig
from luthier.contracts import Command


@dataclass(frozen=True)
class Train(Command):
    """Fine-tune a model: see `TrainConfig`."""

    summary: ClassVar[str] = "fine-tune: model × quantiser × adapter × optimiser × objective × data"
    examples: ClassVar[Sequence[str]] = (
        "train recipe=quickstart",
        "train model.path=FOLDER data=jsonl data.path=rows.jsonl adapter.rank=8",
        "train -m adapter=lora,full optimiser.lr=1e-4,3e-4 …",
        "train resume=RUN",
    )
    options: ClassVar[type[Any]] = TrainConfig
    defaults: ClassVar[Mapping[str, Any]] = TRAIN_DEFAULTS

    def check(self, config: Any) -> None:
        """See `Command.check`."""
        from luthier.commands.checks import check_training

        check_training(config)

    def resumed(self, overrides: Sequence[str]) -> Any:
        """See `Command.resumed`."""
        from luthier.runs import resumed_config

        return resumed_config(overrides)

    def run(self, config: Any) -> Any:
        """Train, and return a `luthier.TrainResult`."""
        from luthier.commands.train import train

        return train(config)


@hookimpl
def register_commands(register: Register) -> None:
    """Register `train`."""
    register("train", Train)
