"""The command `fold` and its options."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from luthier.config import ModelPlace, PluginsConfig
from luthier.contracts import Command, option


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


COMMAND = Command("luthier_plugins.commands.fold.folding:fold", FoldConfig, multirun="writes one model")
