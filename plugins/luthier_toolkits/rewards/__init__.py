"""Networks that score answers, and solutions in steps."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier_toolkits.rewards.detached import DetachedAdapter as DetachedAdapter
    from luthier_toolkits.rewards.network import (
        RewardNetwork as RewardNetwork,
        answer_tree as answer_tree,
        reward_network as reward_network,
    )
    from luthier_toolkits.rewards.scoring import Scores as Scores, Scoring as Scoring
    from luthier_toolkits.rewards.solution_steps import (
        check_separator as check_separator,
        split_steps as split_steps,
        step_tree as step_tree,
    )
else:
    __getattr__, __dir__, __all__ = attach(__name__)
