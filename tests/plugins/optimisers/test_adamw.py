"""AdamW: one step by hand, groups, and ranges."""

import math

import pytest
import torch
from torch import nn

from luthier import ConfigError
from luthier_plugins.optimisers.adamw import AdamW


def test_one_step_is_the_papers():
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    bias = nn.Parameter(torch.tensor([3.0]))
    optimiser = AdamW(lr=0.1, weight_decay=0.5).build([("w", weight), ("b", bias)])
    weight.grad, bias.grad = torch.tensor([[0.2, -0.4]]), torch.tensor([0.3])
    optimiser.step()
    # After one step the bias-corrected moments are g and g², so the update is lr·sign(g) but for eps.
    expected = [(1 - 0.1 * 0.5) * w - 0.1 * g / (abs(g) + 1e-8) for w, g in ((1.0, 0.2), (-2.0, -0.4))]
    torch.testing.assert_close(weight.detach(), torch.tensor([expected]))
    assert math.isclose(bias.item(), 2.9, rel_tol=1e-6)


def test_the_state_it_plans_for_is_the_state_it_has():
    weight = nn.Parameter(torch.ones(64, 64))
    optimiser = AdamW().build([("w", weight)])
    weight.grad = torch.ones_like(weight)
    optimiser.step()
    moments = [v for v in optimiser.state[weight].values() if v.numel() > 1]
    assert sum(v.numel() * v.element_size() for v in moments) == AdamW().state_bytes("w", (64, 64))


@pytest.mark.parametrize(
    "bad", [{"lr": 0.0}, {"lr": -1.0}, {"beta1": 1.0}, {"beta2": -0.1}, {"eps": -1.0}, {"weight_decay": -1.0}]
)
def test_values_that_cannot_train_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        AdamW(**bad)


def named(*names):
    return [(name, nn.Parameter(torch.ones(2, 2))) for name in names] + [
        ("norm.weight", nn.Parameter(torch.ones(2)))
    ]


def test_lora_plus_gives_b_its_own_learning_rate():
    parameters = named("q.lora_A", "q.lora_B", "k.lora_A", "k.lora_B")
    optimiser = AdamW(lr=0.1, lr_factors={"lora_B": 16.0}).build(parameters)
    for _, parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.5)
    optimiser.step()
    for name, parameter in parameters:  # the first step is lr, whatever the gradient
        expected = 1.0 - (1.6 if name.endswith("lora_B") else 0.1)
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, expected))
    assert optimiser.param_groups[0]["lr"] == 0.1, "the rate that is reported is the one without a factor"


def test_schedules_scale_every_group():
    optimiser = AdamW(lr=0.1, lr_factors={"b": 16.0}).build(named("a", "b"))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1.0 if step == 0 else 0.5)
    optimiser.step()
    schedule.step()
    assert [group["lr"] for group in optimiser.param_groups] == [0.05, 0.8]


def test_decay_is_for_matrices_that_are_not_named():
    parameters = named("a.weight", "embed.weight")
    optimiser = AdamW(lr=0.1, weight_decay=0.5, no_decay=["embed"]).build(parameters)
    for _, parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    values = {name: parameter.detach().flatten()[0].item() for name, parameter in parameters}
    assert values == {"a.weight": pytest.approx(0.95), "embed.weight": 1.0, "norm.weight": 1.0}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lr_factors": {"lora_b": 2.0}}, "lr_factors: 'lora_b' matches no .*did you mean 'lora_B'"),
        ({"no_decay": ["embd"]}, "no_decay: 'embd' matches no trained parameter"),
        ({"no_decay": ["("]}, r"'\(' is no regular expression"),
        ({"lr_factors": {"lora_B": 0.0}}, "lr_factors=.* must be positive"),
    ],
)
def test_a_pattern_that_means_nothing_is_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        AdamW(**options).build(named("q.lora_A", "q.lora_B"))
