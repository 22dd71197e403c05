"""The command `plan` and its options."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from luthier import Command, Register, hookimpl, option
from luthier.commands import TRAIN_DEFAULTS, TrainConfig
from luthier.errors import ConfigError


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


@dataclass(frozen=True)
class Plan(Command):
    """Say what a run takes: see `PlanConfig`."""

    summary: ClassVar[str] = "what a run takes and what fits, from shapes alone: nothing is downloaded"
    examples: ClassVar[Sequence[str]] = (
        "plan model=llama3_70b quantiser=nf4 adapter=lora model.device=cuda memory_gb=48",
    )
    options: ClassVar[type[Any]] = PlanConfig
    defaults: ClassVar[Mapping[str, Any]] = {**TRAIN_DEFAULTS, "data": None}
    multirun: ClassVar[str | None] = "ranks the methods itself"
    loads_weights: ClassVar[bool] = False

    def check(self, config: Any) -> None:
        """See `Command.check`."""
        from luthier.commands import check_training

        for key in ("memory_gb", "tflops", "efficiency", "tokens"):
            if config[key] is not None and not 0 < config[key] < math.inf:
                raise ConfigError(f"{key}={config[key]} must be positive")
        check_training(config)

    def run(self, config: Any) -> Any:
        """Plan, and return a `PlanResult`."""
        from luthier_plugins.commands.plan.planning import plan

        return plan(config)


@hookimpl
def register_commands(register: Register) -> None:
    """Register `plan`."""
    register("plan", Plan)
