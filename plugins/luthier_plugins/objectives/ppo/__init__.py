"""PPO: clipped policy gradients on rollouts, with a value head."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier_plugins.objectives.ppo.ppo import PPO as PPO
else:
    __getattr__, __dir__, __all__ = attach(__name__)
