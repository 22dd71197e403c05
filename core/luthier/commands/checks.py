"""Values of options that commands refuse."""

from __future__ import annotations

from omegaconf import DictConfig

from luthier.errors import ConfigError, unknown
from luthier.trees import OVERFLOW, UNUSABLE


def check_positive(config: DictConfig, *keys: str) -> None:
    """Refuse values of `keys` that are neither null nor positive.

    Raises:
        ConfigError: One is.
    """
    for key in keys:
        value = config.get(key)
        if value is not None and not value > 0:
            raise ConfigError(f"{key}={value} must be positive")


def check_training(config: DictConfig) -> None:
    """Refuse options of a training run that mean nothing.

    Raises:
        ConfigError: One does.
    """
    check_positive(config, "batch_size", "log_every", "max_steps", "max_grad_norm")
    check_evaluating(config)
    if config.evaluation.every and config.eval_data is None:
        raise ConfigError("evaluation.every needs held-out rows: choose data@eval_data=SOURCE")
    _check_checkpoints(config)


def check_evaluating(config: DictConfig) -> None:
    """Refuse options of rows and of their evaluation that mean nothing.

    Raises:
        ConfigError: One does.
    """
    check_positive(config, "pack_tokens", "max_length")
    check_evaluation(config)
    if config.overflow not in OVERFLOW:
        raise ConfigError(unknown("overflow", str(config.overflow), OVERFLOW))
    if config.unusable not in UNUSABLE:
        raise ConfigError(unknown("unusable", str(config.unusable), UNUSABLE))
    if not 0 <= config.seed < 2**31:
        raise ConfigError(f"seed={config.seed} must be in [0, 2³¹)")


def check_evaluation(config: DictConfig) -> None:
    """Refuse counts of an evaluation that mean nothing.

    Raises:
        ConfigError: One does.
    """
    _check_least(config, "evaluation", every=0, batch_size=1, max_new_tokens=1, samples=0)


def _check_checkpoints(config: DictConfig) -> None:
    _check_least(config, "checkpoint", every=0, minutes=0, keep=1)
    _check_least(config, "evaluation", patience=1)
    for key in ("patience", "restore_best"):
        if config.evaluation[key] and not config.evaluation.every:
            raise ConfigError(
                f"evaluation.{key} needs evaluations while training: set evaluation.every=STEPS"
            )


def _check_least(config: DictConfig, where: str, **least: int) -> None:
    for key, bound in least.items():
        value = config[where].get(key)
        if value is not None and not value >= bound:
            raise ConfigError(f"{where}.{key}={value} must be at least {bound}")
