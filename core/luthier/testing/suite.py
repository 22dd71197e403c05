"""What the suites share: the method under test, its options, and what every method must be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from luthier.contracts import Method, options_of


class Suite:
    """The checks of one kind, and those of every method.

    Attributes:
        method: The class under test.
        options: Values for its options where the defaults are not what should be tested.
        needs_source: Whether it comes from a paper or library, which it must name.
    """

    method: ClassVar[type[Any]]
    options: ClassVar[Mapping[str, Any]] = {}
    needs_source: ClassVar[bool] = True

    def make(self) -> Any:
        """Return the method under test, with `options`."""
        return self.method(**self.options)

    def test_it_is_a_frozen_dataclass_that_describes_itself(self) -> None:
        """Fields are options, each with help; the class says what it is and where it comes from."""
        name = self.method.__name__
        assert issubclass(self.method, Method), f"{name} must inherit one of Luthier's kinds"
        assert dataclasses.is_dataclass(self.method), f"{name} must be a dataclass: @dataclass(frozen=True)"
        frozen = self.method.__dataclass_params__.frozen
        assert frozen, f"{name} must be frozen: @dataclass(frozen=True)"
        made_up = f"{name}("
        text = (self.method.__doc__ or made_up).strip()
        assert not text.startswith(made_up), f"{name} needs a docstring: it is the help people see"
        sourced = self.method.source or not self.needs_source
        assert sourced, f"{name}.source must name the paper and section, or the library"
        for option, field in options_of(self.method).items():
            assert field.metadata.get("help"), f"{name}.{option} needs help: option(default, 'What it does.')"

    def test_equal_options_make_equal_methods(self) -> None:
        """A method is its options: nothing else is remembered between two runs."""
        assert self.make() == self.make(), "two methods of equal options must be equal; keep state elsewhere"


def seeded(seed: int = 0) -> torch.Generator:
    """Return a generator on the CPU, seeded."""
    return torch.Generator().manual_seed(seed)


def apart(mine: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest value where that is above 1."""
    scale = max(1.0, float(other.abs().max())) if other.numel() else 1.0
    return float((mine.double() - other.double()).abs().max()) / scale if mine.numel() else 0.0
