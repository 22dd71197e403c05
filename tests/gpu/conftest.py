"""Everything here compares a CUDA device with the CPU, and is left out without one.

With ``LUTHIER_SMOKE=1`` it runs on the CPU alone, so that nothing fails for a stupid reason where a device is
at hand for minutes.
"""

import os

import pytest
import torch

from luthier.policy import attention, masked_attention

SMOKE = bool(os.environ.get("LUTHIER_SMOKE"))


def pytest_collection_modifyitems(items):
    """Mark what needs a device."""
    for item in items:
        if "tests/gpu" in item.path.as_posix():
            item.add_marker("gpu")


@pytest.fixture
def cuda(monkeypatch):
    """The device, or no test; the CPU, running what the device would, in a rehearsal."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not SMOKE:
        pytest.skip("needs a CUDA device (LUTHIER_SMOKE=1 rehearses on the CPU)")
    monkeypatch.setattr(attention, "MASKED", {"cpu"})
    monkeypatch.setattr(masked_attention, "_flex", masked_attention._dense)
    return torch.device("cpu")
