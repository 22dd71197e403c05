"""Commands, e.g. `train`: their options, and what runs."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig


def _nothing(config: DictConfig) -> None:
    """Find nothing wrong."""


def _none(overrides: Sequence[str]) -> None:
    """Resume nothing."""


@dataclass(frozen=True)
class Command:
    """A command: ``luthier NAME [overrides]``; one that takes a config is a function of `luthier` too.

    Attributes:
        function: ``module:function``, imported when it runs; takes the composed config, or plain arguments.
        options: A dataclass: schema and help text at once.
        composed: Whether Hydra composes a config for it; else it is given the words of the command line.
        multirun: Why no multirun is made of it; None: one is.
        loads_weights: Whether the methods it is given must run on this machine.
        check: Refuses values of its options, by a `ConfigError`.
        resumed: Returns the config of the run that the overrides go on with, or None.
    """

    function: str
    options: type[Any] | None = None
    composed: bool = True
    multirun: str | None = None
    loads_weights: bool = True
    check: Callable[[DictConfig], None] = _nothing
    resumed: Callable[[Sequence[str]], DictConfig | None] = _none

    @property
    def schema(self) -> type[Any]:
        """The options of a command that is composed."""
        assert self.options is not None
        return self.options

    @property
    def run(self) -> Callable[[Any], Any]:
        """What runs, imported now: takes what `composed` says, and may raise a `LuthierError`."""
        return pkgutil.resolve_name(self.function)  # type: ignore[no-any-return]
