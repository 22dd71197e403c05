"""The commands `train` and `evaluate`, and the shell around all commands: parsing and launching."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier.commands.checks import (
        check_evaluation as check_evaluation,
        check_positive as check_positive,
        check_training as check_training,
    )
    from luthier.commands.cli import main as main
    from luthier.commands.options import TRAIN_DEFAULTS as TRAIN_DEFAULTS, TrainConfig as TrainConfig
    from luthier.commands.positionals import parsed as parsed
    from luthier.commands.preparation import prepared as prepared
else:
    __getattr__, __dir__, __all__ = attach(__name__)
