"""From a method's dataclass to its Hydra node and back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, ValidationError

from luthier.contracts.method import Method, option
from luthier.errors import ConfigError
from luthier.registry.schema import build, node


@dataclass(frozen=True)
class Toy(Method):
    """A method with every sort of annotation."""

    rate: float = option(0.1, "A number.")
    name_of: Literal["a", "b"] = option("a", "A choice.")
    layers: tuple[int, ...] = option((1, 2), "A tuple.")
    limit: int | None = option(None, "Optional.")
    either: str | list[str] = option("x", "A union.")
    table: Mapping[str, Any] = option({}, "A mapping.")
    needed: str = option("???", "What is needed.")
    _hidden: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ConfigError(f"rate={self.rate} must not be negative")


def config(**changes: Any):
    return OmegaConf.merge(OmegaConf.structured(node("toy", Toy)), {"needed": "yes", **changes})


def test_a_method_survives_the_round_trip():
    assert build(Toy, config()) == Toy(needed="yes")
    changed = build(Toy, config(rate=1, layers=[3], limit=4, either=["p", "q"], table={"k": 1}))
    assert changed == Toy(1.0, "a", (3,), 4, ["p", "q"], {"k": 1}, "yes")


def test_types_are_checked_where_they_are_overridden():
    with pytest.raises(ValidationError):
        config(rate="fast")
    with pytest.raises(ValidationError):
        config(layers=["one"])
    with pytest.raises(ConfigKeyError):
        config(rte=1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name_of": "c"}, r"toy.name_of: 'c' is not one of a, b"),
        ({"needed": "???"}, r"toy: needed must be set: What is needed\."),
        ({"rate": -1}, r"toy: rate=-1.0 must not be negative"),
    ],
)
def test_bad_values_are_told_by_name(change, told):
    with pytest.raises(ConfigError, match=told):
        build(Toy, config(**change))


def test_an_option_that_the_method_does_not_have_is_refused():
    with pytest.raises(ConfigError, match=r"unknown option 'rte': did you mean 'rate'"):
        build(Toy, OmegaConf.create({"name": "toy", "rte": 1}))


def test_mutable_defaults_are_not_shared():
    first, second = OmegaConf.structured(node("toy", Toy)), OmegaConf.structured(node("toy", Toy))
    first.layers.append(9)
    assert list(second.layers) == [1, 2]
    assert Toy(needed="").table is not Toy(needed="").table
