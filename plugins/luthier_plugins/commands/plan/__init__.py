"""The command `plan`: what a run takes and what fits, from shapes alone."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier_plugins.commands.plan.planning import PlanResult as PlanResult, plan as plan
else:
    __getattr__, __dir__, __all__ = attach(__name__)
