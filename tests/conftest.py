"""Fixtures shared by all tests."""

import os
import signal
from pathlib import Path

# Toy models gain nothing from threads, and two test processes with two threads each fight over two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# There is no model hub in a test, and asking for one takes half a minute to fail.
os.environ["HF_HUB_OFFLINE"] = "1"

# A forecast of memory runs every model once more, on shapes: longer than most runs of these tests take.
# tests/commands/plan has it.
os.environ.setdefault("LUTHIER_BLOCKED", "forecast.memory")

# A parent that ignores Ctrl-C, as nohup and some CI do, leaves that to its children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from strangers import Strangers

UNITS = tuple(Path(__file__).with_name(name) for name in ("core", "toolkits", "plugins"))


def pytest_collection_modifyitems(items):
    """Mark what coverage is measured of."""
    for item in items:
        if any(item.path.is_relative_to(folder) for folder in UNITS):
            item.add_marker("unit")


@pytest.fixture
def strangers(tmp_path, monkeypatch):
    """Install throw-away third-party distributions."""
    return Strangers(tmp_path, monkeypatch)
