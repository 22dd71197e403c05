"""DPO, IPO, SimPO and ORPO against numbers worked out by hand, and the ranges of their options."""

import math

import pytest
import torch

from luthier import ConfigError
from luthier_plugins.objectives.dpo import DPO
from luthier_plugins.objectives.ipo import IPO
from luthier_plugins.objectives.kto.kto import KTO
from luthier_plugins.objectives.orpo import ORPO
from luthier_plugins.objectives.simpo import SimPO
from luthier_toolkits.preference import Side


def side(total, length, reference=0.0):
    return Side(torch.tensor([total]), torch.tensor([float(length)]), torch.tensor([reference]))


CHOSEN, REJECTED = side(-6.0, 4, -7.0), side(-10.0, 5, -8.0)
"""log-ratios 1 and −2: h = 3, and per token 0.25 and −0.4; means −1.5 and −2."""


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (DPO(beta=0.5), -math.log(sigmoid(1.5))),
        (DPO(beta=0.5, label_smoothing=0.2), -0.8 * math.log(sigmoid(1.5)) - 0.2 * math.log(sigmoid(-1.5))),
        (IPO(beta=0.25), (0.65 - 2.0) ** 2),
        (IPO(beta=0.25, length_normalised=False), (3.0 - 2.0) ** 2),
        (SimPO(beta=2.0, gamma=0.5), -math.log(sigmoid(2 * 0.5 - 0.5))),
        (
            ORPO(beta=0.3),
            1.5 - 0.3 * math.log(sigmoid(
                math.log(math.exp(-1.5) / (1 - math.exp(-1.5))) - math.log(math.exp(-2) / (1 - math.exp(-2)))
            )),
        ),
    ],
    ids=lambda one: repr(one)[:40],
)  # fmt: skip
def test_the_loss_is_the_papers(objective, expected):
    assert float(objective.pair_loss(CHOSEN, REJECTED)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [(DPO(beta=0.5), 0.5), (IPO(beta=0.2), 0.05), (SimPO(beta=2.0), -3.0), (ORPO(beta=0.1), -0.15)],
    ids=lambda one: repr(one)[:20],
)
def test_the_reward_is_what_the_loss_compares(objective, expected):
    assert float(objective.reward(CHOSEN)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("method", [DPO, IPO, KTO, ORPO, SimPO])
@pytest.mark.parametrize("beta", [0.0, -0.1, math.inf, math.nan])
def test_a_beta_that_is_not_positive_is_refused(method, beta):
    with pytest.raises(ConfigError, match=r"objective\.beta=.* must be positive"):
        method(beta=beta)


@pytest.mark.parametrize("share", [-0.1, 0.5, 1.0])
def test_labels_that_are_mostly_wrong_are_refused(share):
    with pytest.raises(ConfigError, match=r"objective\.label_smoothing=.* must be in \[0, 0\.5\)"):
        DPO(label_smoothing=share)
