"""Weights & Biases."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier_plugins.trackers.wandb.wandb import WandB as WandB
else:
    __getattr__, __dir__, __all__ = attach(__name__)
