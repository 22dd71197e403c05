"""Advantages and KL estimators, against hand-computed numbers and plain sums."""

import pytest
import torch

from luthier_plugins.objectives.ppo.advantages import advantages, kl_estimate


def test_advantages_by_hand():
    # δ = (1 + 0.5·2 − 1, 0 + 0.5·4 − 2, 3 − 4) = (1, 0, −1); γλ = 0.25: A₂ = −1, A₁ = −0.25, A₀ = 0.9375.
    found = advantages(torch.tensor([1.0, 0.0, 3.0]), torch.tensor([1.0, 2.0, 4.0]), gamma=0.5, lam=0.5)
    assert found.tolist() == [0.9375, -0.25, -1.0]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_are_the_papers_sum(gamma, lam):
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    deltas = [
        float(rewards[t]) + gamma * (float(values[t + 1]) if t < 8 else 0.0) - float(values[t])
        for t in range(9)
    ]
    expected = [sum((gamma * lam) ** k * deltas[t + k] for k in range(9 - t)) for t in range(9)]
    torch.testing.assert_close(
        advantages(rewards, values, gamma, lam), torch.tensor(expected, dtype=torch.float64)
    )


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_estimates_have_the_divergence_as_their_mean(estimator):
    one, other = torch.tensor(
        [[2.0, 0.5, -1.0, 0.0], [0.0, 1.0, -0.5, 0.3]], dtype=torch.float64
    ).log_softmax(-1)
    mean = (one.exp() * kl_estimate(one - other, estimator)).sum()
    torch.testing.assert_close(mean, (one.exp() * (one - other)).sum())


def test_one_of_them_is_never_negative():
    ratios = torch.linspace(-3, 3, 61)
    assert (kl_estimate(ratios, "k3") >= 0).all()
    assert (kl_estimate(ratios, "k1") < 0).any()
