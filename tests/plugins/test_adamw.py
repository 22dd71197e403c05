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
