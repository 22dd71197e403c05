"""bitsandbytes' AdamW: its steps against torch's, what a moment takes, where it runs, loading a state."""

import logging

import pytest
import torch
from torch import nn

import luthier
from luthier import ConfigError
from luthier_plugins.optimisers.adamw import AdamW
from luthier_plugins.optimisers.adamw_8bit import AdamW8bit
from luthier_plugins.optimisers.paged_adamw import PagedAdamW
from luthier_plugins.optimisers.paged_adamw_8bit import PagedAdamW8bit
from luthier_toolkits.bitsandbytes.optimiser import SMALLEST

ALL = [AdamW8bit, PagedAdamW, PagedAdamW8bit]
on_cpu = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")


def trained(cls, steps=20, shape=(128, 96), **options):
    """A matrix and a vector after some steps on gradients that are the same for every optimiser."""
    generator = torch.Generator().manual_seed(0)
    named = [("w", nn.Parameter(torch.ones(shape))), ("b", nn.Parameter(torch.ones(shape[0])))]
    optimiser = cls(lr=1e-2, **options).build(named)
    for _ in range(steps):
        for _, parameter in named:
            parameter.grad = torch.randn(parameter.shape, generator=generator) + 0.5
        optimiser.step()
    return optimiser, *(parameter.detach() for _, parameter in named)


@on_cpu
def test_in_32_bits_it_takes_the_steps_of_torchs_adamw():
    options = {"weight_decay": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6}
    _, weight, bias = trained(PagedAdamW, **options)
    _, torchs_weight, torchs_bias = trained(AdamW, **options)
    torch.testing.assert_close(weight, torchs_weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias, torchs_bias, rtol=1e-5, atol=1e-6)


@on_cpu
@pytest.mark.parametrize("cls", [AdamW8bit, PagedAdamW8bit])
def test_in_8_bits_it_stays_near_them(cls):
    optimiser, weight, bias = trained(cls, weight_decay=0.1)
    _, torchs_weight, torchs_bias = trained(AdamW, weight_decay=0.1)
    moved = (torchs_weight - 1).abs().mean()
    assert 0 < (weight - torchs_weight).abs().mean() < 0.05 * moved  # rounded, and not by much
    torch.testing.assert_close(bias, torchs_bias, rtol=1e-5, atol=1e-6)  # small: fp32
    dtypes = [state["state1"].dtype for state in optimiser.state.values()]
    assert dtypes == [torch.uint8, torch.float32]


@on_cpu
@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("shape", [(128, 96), (SMALLEST // 64, 63), (100, 41)])
def test_the_bytes_it_plans_are_the_bytes_it_holds(cls, shape):
    optimiser, *_ = trained(cls, steps=1, shape=shape)
    state = optimiser.state[optimiser.param_groups[0]["params"][0]]
    parts = [state[name] for name in ("state1", "state2", "absmax1", "absmax2") if name in state]
    assert sum(part.numel() * part.element_size() for part in parts) == cls().state_bytes("w", shape)


@on_cpu
@pytest.mark.parametrize("cls", ALL)
def test_a_loaded_state_goes_where_a_fresh_one_would(cls, monkeypatch):
    """Elsewhere a resumed run would hold in device memory what was paged before."""
    optimiser, _, _ = trained(cls, steps=3)
    fresh, _, _ = trained(cls, steps=0)
    asked = []
    buffer = fresh.get_state_buffer
    monkeypatch.setattr(fresh, "get_state_buffer", lambda p, dtype: asked.append(dtype) or buffer(p, dtype))
    fresh.load_state_dict(optimiser.state_dict())
    assert len(asked) == 4  # two moments of two parameters
    for mine, loaded in zip(optimiser.state.values(), fresh.state.values(), strict=True):
        assert torch.equal(mine["state1"], loaded["state1"])
        assert torch.equal(mine["state2"], loaded["state2"])


@pytest.mark.parametrize("cls", [PagedAdamW, PagedAdamW8bit])
def test_paged_ones_need_cuda_and_say_what_to_take_instead(cls):
    name = "paged_adamw_8bit" if cls is PagedAdamW8bit else "paged_adamw"
    overrides = ["model.path=x", "model.device=cpu", "data=jsonl", "data.path=x", f"optimiser={name}"]
    told = rf"optimiser={name} needs cuda, and this run is on cpu: .*choose optimiser=adamw"
    with pytest.raises(ConfigError, match=told):
        luthier.compose("train", overrides)


def test_on_cpu_it_names_the_faster_one(caplog):
    with caplog.at_level(logging.WARNING, "luthier"):
        trained(AdamW8bit, steps=1)
    assert "choose optimiser=adamw" in caplog.text
