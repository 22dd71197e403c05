"""Which methods go together: rules by name, for a whole kind, by attribute; devices."""

from typing import ClassVar

import pytest

from luthier import ConfigError, compose
from luthier.contracts.method import Method
from luthier.registry.compatibility import device_refusal, refusal

NEEDED = ["model.path=x", "model.device=cpu", "data=jsonl", "data.path=x"]


class Frozen(Method):
    trains_base: ClassVar[bool] = False


class Trained(Method):
    trains_base: ClassVar[bool] = True


def refusing(rules, **more):
    return type("Refusing", (Method,), {"refuses": rules, **more})


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"adapter=a": "take b"}, "optimiser=o cannot be combined with adapter=a: take b"),
        ({"adapter=*": "take none"}, "optimiser=o cannot be combined with adapter=a: take none"),
        (
            {"adapter.trains_base=False": "take full"},
            "optimiser=o cannot be combined with adapter=a: take full",
        ),
        ({"adapter=b": "take a"}, None),
        ({"adapter.trains_base=True": "take a"}, None),
        ({"quantiser=*": "take none"}, None),
        ({"adapter.depth=1": "there is no such thing"}, None),
    ],
)
def test_a_rule_refuses_what_it_names_and_nothing_else(rules, told):
    assert refusal({"adapter": ("a", Frozen), "optimiser": ("o", refusing(rules))}) == told


def test_a_rule_by_attribute_is_about_the_class_not_its_name():
    rules = {"adapter.trains_base=False": "take full"}
    assert refusal({"adapter": ("a", Trained), "optimiser": ("o", refusing(rules))}) is None


def test_either_side_may_refuse():
    told = refusal({"adapter": ("a", refusing({"optimiser=o": "take p"})), "optimiser": ("o", Frozen)})
    assert told == "adapter=a cannot be combined with optimiser=o: take p"


def test_a_method_runs_on_the_device_it_needs_and_on_no_other():
    chosen = {"optimiser": ("o", refusing({}, needs_device={"cuda": "take p"}))}
    assert device_refusal(chosen, "cuda") is None
    assert device_refusal(chosen, "cpu") == "optimiser=o needs cuda, and this run is on cpu: take p"


def test_what_is_only_looked_at_needs_no_device():
    with pytest.raises(ConfigError, match="needs cuda"):
        compose("train", [*NEEDED, "optimiser=paged_adamw"])
    assert compose("preview", [*NEEDED, "optimiser=paged_adamw"]).optimiser.name == "paged_adamw"


def test_a_run_can_do_without_a_quantiser_in_so_many_words():
    assert not compose("train", [*NEEDED, "quantiser=none", "adapter=full"]).quantiser
    with pytest.raises(ConfigError, match=r"quantiser=null: expected the name of one of .*none"):
        compose("train", [*NEEDED, "quantiser=null"])
