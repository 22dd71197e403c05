"""How torch is told to sum, for this process."""

import os

import pytest
import torch

from luthier import ConfigError
from luthier.system import pick_device, pick_dtype, settle

MATMUL = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Leave torch as it was found."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    halves = MATMUL.allow_bf16_reduced_precision_reduction, MATMUL.allow_fp16_reduced_precision_reduction
    yield
    MATMUL.allow_bf16_reduced_precision_reduction, MATMUL.allow_fp16_reduced_precision_reduction = halves
    torch.use_deterministic_algorithms(False)


def test_the_device_and_what_it_computes_in_are_asked_of_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert pick_dtype("auto", pick_device("cuda:1")) == torch.bfloat16
    with pytest.raises(ConfigError, match="sees 2 CUDA devices"):
        pick_device("cuda:2")


def test_products_of_16_bits_are_summed_in_32():
    MATMUL.allow_bf16_reduced_precision_reduction = MATMUL.allow_fp16_reduced_precision_reduction = True
    settle(deterministic=False)
    assert not MATMUL.allow_bf16_reduced_precision_reduction
    assert not MATMUL.allow_fp16_reduced_precision_reduction
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_one_order_of_sums_is_asked_of_torch_and_of_cublas():
    settle(deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.utils.deterministic.fill_uninitialized_memory
