"""Reward modelling: a score of whole answers, learned from preferences."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier_plugins.objectives.reward.reward import Reward as Reward
else:
    __getattr__, __dir__, __all__ = attach(__name__)
