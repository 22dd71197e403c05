"""The command `fold` and its options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from luthier import Command, Register, hookimpl, option
from luthier.config import ModelPlace
from luthier.runs import PluginsConfig


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
    out: str = option("???", "Folder to write the model to; a new or an empty one.")
    dtype: str = option("bfloat16", "What is written: float32, bfloat16 or float16.")
    plugins: PluginsConfig = field(default_factory=PluginsConfig)


@dataclass(frozen=True)
class Fold(Command):
    """Fold an adapter into its base: see `FoldConfig`."""

    summary: ClassVar[str] = (
        "an adapter and its base made one plain model, with the error of rounding layer by layer"
    )
    examples: ClassVar[Sequence[str]] = ("fold RUN FOLDER",)
    options: ClassVar[type[Any]] = FoldConfig
    defaults: ClassVar[Mapping[str, Any]] = {"model": None, "quantiser": None}
    positionals: ClassVar[tuple[str, ...]] = ("model.path", "out")
    multirun: ClassVar[str | None] = "writes one model"

    def run(self, config: Any) -> Any:
        """Fold, and return a `FoldReport`."""
        from luthier_plugins.commands.fold.folding import fold

        return fold(config)


@hookimpl
def register_commands(register: Register) -> None:
    """Register `fold`."""
    register("fold", Fold)
