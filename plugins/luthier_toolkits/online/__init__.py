"""Objectives that learn from what the policy itself answers."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier_toolkits.online.objective import OnlineObjective as OnlineObjective
    from luthier_toolkits.online.rollout import (
        LOGPROB as LOGPROB,
        REFERENCE as REFERENCE,
        VALUE as VALUE,
        Credited as Credited,
        Rollout as Rollout,
    )
else:
    __getattr__, __dir__, __all__ = attach(__name__)
