"""Everything here needs a CUDA device and is left out without one."""

import pytest
import torch


@pytest.fixture(autouse=True)
def cuda():
    """The device, or no test."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")
