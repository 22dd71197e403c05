"""Runs forecast their memory here, which the other tests leave out."""

import pytest

from luthier.registry import catalogue
from luthier_plugins.commands.plan import forecast


@pytest.fixture(autouse=True)
def forecasts():
    """Let runs of this process be forecast."""
    hooks = catalogue().hooks
    hooks.register(forecast)
    yield
    hooks.unregister(forecast)
