"""Lion: two steps by hand, the ranges of its options, and Luthier's suite of optimisers."""

import pytest
import torch
from torch import nn

from luthier import ConfigError
from luthier.testing import OptimiserSuite
from luthier_lion.lion import Lion


class TestLion(OptimiserSuite):
    method = Lion


class TestLionWithDecay(OptimiserSuite):
    method = Lion
    options = {"lr": 1e-3, "weight_decay": 0.1}


def test_two_steps_are_the_papers():
    weight, bias = nn.Parameter(torch.tensor([[1.0, -2.0, 3.0]])), nn.Parameter(torch.tensor([0.5]))
    optimiser = Lion(lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.5).build([("w", weight), ("b", bias)])
    weight.grad, bias.grad = torch.tensor([[0.2, -0.4, 0.0]]), torch.tensor([3.0])
    optimiser.step()
    # m is 0, so the update is the gradient's sign; decay is lr·λ = 0.05 of the weight, of matrices only.
    torch.testing.assert_close(weight.detach(), torch.tensor([[0.95 - 0.1, -1.9 + 0.1, 2.85]]))
    torch.testing.assert_close(bias.detach(), torch.tensor([0.4]))
    torch.testing.assert_close(optimiser.state[weight]["momentum"], torch.tensor([[0.002, -0.004, 0.0]]))
    weight.grad, bias.grad = torch.tensor([[-0.01, -0.4, 1.0]]), torch.tensor([-3.0])
    optimiser.step()
    # 0.9·0.002 − 0.1·0.01 > 0: the momentum outvotes the first gradient. 0.9·0.03 − 0.1·3 < 0: not the last.
    expected = torch.tensor([[0.85 * 0.95 - 0.1, -1.8 * 0.95 + 0.1, 2.85 * 0.95 - 0.1]])
    torch.testing.assert_close(weight.detach(), expected)
    torch.testing.assert_close(bias.detach(), torch.tensor([0.5]))
    expected = torch.tensor([[0.99 * 0.002 - 0.0001, 0.99 * -0.004 - 0.004, 0.01]])
    torch.testing.assert_close(optimiser.state[weight]["momentum"], expected)


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"beta1": 1.0}, {"beta2": -0.1}, {"weight_decay": -1.0}])
def test_values_that_cannot_train_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Lion(**bad)
