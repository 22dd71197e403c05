"""`train` and `evaluate` as commands."""

from luthier.commands.checks import check_evaluating, check_training
from luthier.commands.options import EvaluateConfig, TrainConfig
from luthier.contracts import Command
from luthier.runs import resumed_config

TRAIN = Command("luthier.commands.train:train", TrainConfig, check=check_training, resumed=resumed_config)
EVALUATE = Command("luthier.evaluation.evaluate:evaluate", EvaluateConfig, check=check_evaluating)
