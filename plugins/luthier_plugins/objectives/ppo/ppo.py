"""PPO: clipped policy gradients on the policy's own answers, with a value head and a KL penalty."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from luthier import ConfigError, GuardError, Loss, Pack, Policy, Register, hookimpl, option
from luthier_plugins.objectives.ppo.advantages import (
    adapted_kl_coefficient,
    advantages,
    explained_variance,
    kl_estimate,
)
from luthier_toolkits.online import LOGPROB, REFERENCE, VALUE, Credited, OnlineObjective, Rollout
from luthier_toolkits.preference import check_positive

ADVANTAGE, RETURN, COEFFICIENT = "advantage", "return", "kl_coefficient"


@dataclass(frozen=True, kw_only=True)
class PPO(OnlineObjective):
    """``max(−Aρ, −A·clip(ρ, 1 ± ε)) + c·½·max((V − R)², (clip(V, V_old ± ε_V) − R)²)``, a mean over tokens.

    ρ = π/π_old. The reward of a token is −β·KL(π ‖ π_ref) there, and on the last one the answer's score as
    well; A is its generalised advantage, whitened over the rollout, R = A + V_old before that. Answers are
    sampled at temperature 1, so that they are the policy's own. β is fixed, or with `kl_target` adaptive.
    """

    source: ClassVar[str] = (
        "Schulman et al. 2017, arXiv 1707.06347, equations 7 and 9; GAE: Schulman et al. 2015, arXiv "
        "1506.02438, equation 16; reward and adaptive β: Ziegler et al. 2019, arXiv 1909.08593, section 2.2; "
        "Ouyang et al. 2022, arXiv 2203.02155, section 3.5"
    )
    head: ClassVar[str | None] = "value"
    holds: ClassVar[Mapping[str, str]] = {"value": "head"}

    clip_range: float = option(0.2, "ε: how far a token's probability ratio counts.", was="clip")
    value_clip: float = option(0.2, "ε_V: how far a value counts.")
    value_coefficient: float = option(0.1, "c: weight of the value loss.", was="value_weight")
    gamma: float = option(1.0, "Discount of later rewards, in (0, 1].")
    gae_lambda: float = option(0.95, "λ of the advantage, in [0, 1].")
    whiten: bool = option(True, "Scale the advantages of a rollout to mean 0 and deviation 1.")
    kl_coefficient: float = option(0.05, "β: weight of the KL penalty; with kl_target, where it begins.")
    kl_estimator: Literal["k1", "k3"] = option(
        "k1", "Of a token's KL: k1, log π/π_ref; k3, π_ref/π − 1 + log π/π_ref, never negative."
    )
    kl_target: float | None = option(None, "KL of an answer in nats that β is adapted to; null: β is fixed.")
    kl_horizon: float = option(10000.0, "Answers in which β may change by a factor of about e^0.2.")
    max_kl: float | None = option(
        50.0, "Stop where the mean KL of answers passes this, in nats; null: never."
    )
    max_reward: float | None = option(None, "Stop where the mean reward passes this: it is being exploited.")

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: An option is out of range.
        """
        super().__post_init__()
        check_positive(clip_range=self.clip_range, value_clip=self.value_clip, kl_horizon=self.kl_horizon)
        check_positive(kl_target=1.0 if self.kl_target is None else self.kl_target)
        for name in ("value_coefficient", "kl_coefficient"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"objective.{name}={getattr(self, name)} must not be negative")
        if not (0 < self.gamma <= 1 and 0 <= self.gae_lambda <= 1):
            raise ConfigError(
                f"objective.gamma={self.gamma}, gae_lambda={self.gae_lambda} must be in (0, 1], [0, 1]"
            )

    def credit(self, rollout: Rollout, state: Mapping[str, float]) -> Credited:
        """Return the rollout with the advantage and the return of every token."""
        beta = state.get(COEFFICIENT, self.kl_coefficient)
        scores = [score for own in rollout.scores for score in own]
        mine, other, values = (rollout.notes(name) for name in (LOGPROB, REFERENCE, VALUE))
        kls = [logprob - reference for logprob, reference in zip(mine, other, strict=True)]
        rewards = [-beta * kl_estimate(kl, self.kl_estimator) for kl in kls]
        for reward, score in zip(rewards, scores, strict=True):
            reward[-1] += score
        gains = [advantages(r, v, self.gamma, self.gae_lambda) for r, v in zip(rewards, values, strict=True)]
        returns = [gain + value for gain, value in zip(gains, values, strict=True)]
        every = torch.cat(gains)
        if self.whiten:
            gains = [(gain - every.mean()) / (every.std(correction=0) + 1e-8) for gain in gains]
        kl = float(torch.stack([log_ratio.sum() for log_ratio in kls]).mean())
        self._guard(kl, sum(scores) / len(scores))
        explained = explained_variance(torch.cat(values), torch.cat(returns))
        after = beta
        if self.kl_target is not None:
            after = adapted_kl_coefficient(beta, kl, self.kl_target, len(kls) / self.kl_horizon)
        trees = rollout.noted({ADVANTAGE: gains, RETURN: returns})
        return Credited(trees, {COEFFICIENT: beta, "explained_variance": explained}, {COEFFICIENT: after})

    def _guard(self, kl: float, reward: float) -> None:
        for name, value, limit, what in (
            ("max_kl", kl, self.max_kl, "the KL of answers from where training started is"),
            ("max_reward", reward, self.max_reward, "the mean reward is"),
        ):
            if limit is not None and value > limit:
                raise GuardError(
                    f"{what} {value:.3g}, and objective.{name}={limit:g}: the policy exploits its "
                    "reward rather than getting better. A checkpoint is kept; raise "
                    "objective.kl_coefficient, or the limit"
                )

    def loss(self, policy: Policy, pack: Pack) -> Loss:
        """Return the sum over the answers' tokens; its weight is their number."""
        logprobs, values = policy.valued(pack)
        gain, target, before = pack.notes(ADVANTAGE), pack.notes(RETURN), pack.notes(VALUE)
        log_ratio = logprobs.values - pack.notes(LOGPROB)
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        losses = torch.maximum(-gain * ratio, -gain * clipped)
        near = before + (values - before).clamp(-self.value_clip, self.value_clip)
        errors = 0.5 * torch.maximum((values - target).square(), (near - target).square())
        with torch.no_grad():
            quantities = {
                "policy_loss": losses,
                "value_loss": errors,
                "clip_fraction": (-gain * clipped > -gain * ratio).float(),
                "step_kl": kl_estimate(-log_ratio, "k3"),
            }
        count = float(len(losses))
        metrics = {name: (value.detach().sum(), count) for name, value in quantities.items()}
        return Loss((losses + self.value_coefficient * errors).sum(), count, metrics)


@hookimpl
def register_objectives(register: Register) -> None:
    """Register `ppo`."""
    register("ppo", PPO)
