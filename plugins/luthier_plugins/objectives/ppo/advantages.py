"""What answers are worth token by token: generalised advantages; a KL divergence and its weight."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def advantages(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Return A_t = Σ_k (γλ)^k δ_{t+k}, δ_t = r_t + γ·V_{t+1} − V_t, of one answer; V is 0 behind its end.

    Schulman et al. 2015, arXiv 1506.02438, equation 16.

    Args:
        rewards: (T,) reward of every token.
        values: (T,) value before every token.
        gamma: γ.
        lam: λ.
    """
    after = torch.cat([values[1:], values.new_zeros(1)])
    deltas = (rewards + gamma * after - values).tolist()
    gains, later = [0.0] * len(deltas), 0.0
    for place in range(len(deltas) - 1, -1, -1):
        later = deltas[place] + gamma * lam * later
        gains[place] = later
    return torch.tensor(gains, dtype=rewards.dtype)


def kl_estimate(log_ratio: Tensor, estimator: Literal["k1", "k3"]) -> Tensor:
    """Return an unbiased estimate of KL(π ‖ π_ref) for every token sampled from π.

    k1 is log π/π_ref; k3 is π_ref/π − 1 + log π/π_ref, never negative and of less variance (Schulman 2020,
    "Approximating KL divergence").

    Args:
        log_ratio: (T,) log π/π_ref.
        estimator: k1 or k3.
    """
    return log_ratio if estimator == "k1" else torch.expm1(-log_ratio) + log_ratio


def adapted_kl_coefficient(beta: float, kl: float, target: float, share: float) -> float:
    """Return the weight of the KL penalty after answers with a mean `kl`, for one of `target` nats.

    Ziegler et al. 2019, arXiv 1909.08593, section 2.2.

    Args:
        beta: The weight so far.
        kl: What was measured.
        target: What it should be.
        share: How much of the horizon has passed.
    """
    return beta * (1 + min(0.2, max(-0.2, kl / target - 1)) * share)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """Return 1 − Var(R − V)/Var(R) of `values` and `returns` (n,); 0 where returns do not vary."""
    spread = float(returns.var(correction=0))
    return 1 - float((returns - values).var(correction=0)) / spread if spread > 0 else 0.0
