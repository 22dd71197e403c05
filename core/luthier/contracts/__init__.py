"""What a plugin implements, and the manual of it.

`Method`, the kinds with their base classes, the hook specs.
"""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier.contracts.adapter import Adapter as Adapter
    from luthier.contracts.command import Command as Command
    from luthier.contracts.data_source import DataSource as DataSource, Row as Row
    from luthier.contracts.hookspecs import PROJECT as PROJECT, SPECIFICATIONS as SPECIFICATIONS
    from luthier.contracts.kinds import (
        ALL_KINDS as ALL_KINDS,
        COMMAND as COMMAND,
        KINDS as KINDS,
        NAME as NAME,
        Kind as Kind,
    )
    from luthier.contracts.merger import Group as Group, Groups as Groups, Merger as Merger
    from luthier.contracts.method import Method as Method, option as option, options_of as options_of
    from luthier.contracts.objective import (
        Finding as Finding,
        Loss as Loss,
        Measured as Measured,
        Objective as Objective,
    )
    from luthier.contracts.optimiser import (
        InBackward as InBackward,
        Optimiser as Optimiser,
        Skipping as Skipping,
    )
    from luthier.contracts.quantiser import Quantiser as Quantiser
    from luthier.contracts.reward_model import (
        Candidate as Candidate,
        Place as Place,
        RewardModel as RewardModel,
        Scorer as Scorer,
    )
    from luthier.contracts.row_filter import RowFilter as RowFilter
    from luthier.contracts.selector import Selector as Selector
    from luthier.contracts.tracker import Tracker as Tracker
else:
    __getattr__, __dir__, __all__ = attach(__name__)
