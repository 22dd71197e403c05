"""Fixtures shared by all tests."""

import pytest
import torch
from strangers import Strangers


@pytest.fixture(autouse=True, scope="session")
def _two_threads():
    torch.set_num_threads(2)


@pytest.fixture
def strangers(tmp_path, monkeypatch):
    """Install throw-away third-party distributions."""
    return Strangers(tmp_path, monkeypatch)
