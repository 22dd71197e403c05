"""The options of run folders that belong to no method and to no single command."""

from dataclasses import dataclass

from luthier.contracts import option


@dataclass
class CheckpointConfig:
    """When checkpoints are saved; every run saves one when it is stopped by Ctrl-C or SIGTERM."""

    every: int | None = option(None, "Steps between checkpoints; null: by time; 0: only when stopped.")
    minutes: float = option(10.0, "Minutes between checkpoints where `every` is null; the last step has one.")
    keep: int = option(2, "Checkpoints that stay; the best one (evaluation.restore_best) stays besides.")


@dataclass
class PluginsConfig:
    """What a run expects of the installed plugins."""

    required: list[str] = option([], "Requirements that must be met, e.g. 'luthier-toy>=0.2'.")
