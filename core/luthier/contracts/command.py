"""Commands, e.g. `train`: their options, and what runs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import TYPE_CHECKING, Any, ClassVar

from luthier.contracts.method import Method

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass(frozen=True)
class Command(Method):
    """A command: ``luthier NAME [options]``; one that takes a config is ``luthier.NAME(config)`` too.

    The module that registers it imports no torch, so that ``luthier --help`` starts at once: `run`, `check`
    and `resumed` import what they need.

    Attributes:
        summary: What it does, one line of ``luthier --help``.
        examples: Command lines without ``luthier``, shown with its help.
        options: A dataclass whose fields are declared with `option`: schema and help text at once.
        defaults: What is chosen of each group where nobody chooses, in the order of Hydra's defaults list:
            ``{"model": None, "adapter": "lora", "data": "???"}``; ``???`` must be chosen.
        positionals: The options that bare words fill, in order; the last one before ``...`` takes all others.
        subcommands: Name → summary, of a command that takes plain arguments.
        composed: Whether Hydra composes a config for it; else `run` is given the words of the command line.
        multirun: Why no multirun is made of it, e.g. ``"writes one file"``; then no run folder either. None:
            one is, if there is an option ``run_dir``, which names the run folder.
        loads_weights: Whether the methods it is given must run on this machine.
    """

    summary: ClassVar[str]
    examples: ClassVar[Sequence[str]] = ()
    options: ClassVar[type[Any]] = type(None)
    defaults: ClassVar[Mapping[str, Any]] = {}
    positionals: ClassVar[tuple[str | EllipsisType, ...]] = ()
    subcommands: ClassVar[Mapping[str, str]] = {}
    composed: ClassVar[bool] = True
    multirun: ClassVar[str | None] = None
    loads_weights: ClassVar[bool] = True

    @property
    def single(self) -> str | None:
        """Why there are no folders of runs, and so no multirun; None: there are."""
        return self.multirun or (None if hasattr(self.options, "run_dir") else "writes no run folder")

    def check(self, config: DictConfig) -> None:
        """Refuse values of the options.

        Raises:
            ConfigError: One means nothing.
        """

    def resumed(self, overrides: Sequence[str]) -> DictConfig | None:
        """Return the config of the run that the overrides go on with, or None."""
        return None

    @abstractmethod
    def run(self, config: Any) -> Any:
        """Do what the composed `config` says, or the words of the command line, and return the result.

        Raises:
            LuthierError: Something a person can mend; it becomes one line and the exit status 2.
        """
