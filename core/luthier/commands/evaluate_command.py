"""The command `evaluate`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from luthier import Register, hookimpl
from luthier.commands.options import EvaluateConfig
from luthier.contracts import Command


@dataclass(frozen=True)
class Evaluate(Command):
    """Measure a model on held-out rows: see `EvaluateConfig`."""

    summary: ClassVar[str] = "loss, perplexity and verified answers of a model on held-out rows"
    examples: ClassVar[Sequence[str]] = ("evaluate RUN data=jsonl data.path=held_out.jsonl",)
    options: ClassVar[type[Any]] = EvaluateConfig
    defaults: ClassVar[Mapping[str, Any]] = {
        "model": None, "quantiser": None, "objective": "sft", "data": "???", "row_filter": [],
        "tracker": ["progress"],
    }  # fmt: skip
    positionals: ClassVar[tuple[str, ...]] = ("model.path",)

    def check(self, config: Any) -> None:
        """See `Command.check`."""
        from luthier.commands.checks import check_evaluating

        check_evaluating(config)

    def run(self, config: Any) -> Any:
        """Measure, and return a `luthier.EvaluationReport`."""
        from luthier import evaluate

        return evaluate(config)


@hookimpl
def register_commands(register: Register) -> None:
    """Register `evaluate`."""
    register("evaluate", Evaluate)
