"""Every registered method passes the suite of its kind; a method added later needs no line here."""

import dataclasses

import pytest

import conforming
from luthier.contracts.kinds import ALL_KINDS
from luthier.contracts.method import options_of
from luthier.registry import catalogue, commands
from luthier.testing import SUITES


def suite_of(one) -> type:
    """A class for pytest: the suite of the method's kind, or the one with inputs of its own."""
    suite = conforming.SUITES.get(one.cls, SUITES[one.kind])
    return type(f"Test_{one.kind}_{one.name}", (suite,), {"method": one.cls, "__module__": __name__})


METHODS = catalogue().all() + commands().all()
globals().update({cls.__name__: cls for cls in map(suite_of, METHODS)})


def test_every_kind_has_a_suite():
    assert SUITES.keys() == ALL_KINDS.keys()


def test_no_plugin_is_broken():
    assert catalogue().broken == commands().broken == {}


@pytest.mark.parametrize("one", METHODS, ids=lambda one: f"{one.kind}.{one.name}")
def test_a_method_that_cannot_be_made_from_its_defaults_has_inputs_of_its_own(one):
    must = [key for key, f in options_of(one.cls).items() if f.default == "???" or _without_default(f)]
    assert not must or one.cls in conforming.SUITES, f"{must} must be set: add a suite to tests/conforming.py"


def _without_default(field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
