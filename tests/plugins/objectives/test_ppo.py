"""PPO: its credit and its loss against plain loops, and a problem whose optimum is known."""

import math

import pytest
import torch

from helpers import tiny_llama
from luthier import Branch, ConfigError, GuardError, ModelPolicy, Pack, Tree
from luthier.models.score_head import attach_head
from luthier_plugins.objectives.ppo.ppo import ADVANTAGE, COEFFICIENT, PPO, RETURN
from luthier_toolkits.online import LOGPROB, REFERENCE, VALUE, Rollout

NOTES = (
    {LOGPROB: (-1.0, -2.0), REFERENCE: (-1.5, -1.0), VALUE: (0.5, 1.0)},
    {LOGPROB: (-3.0,), REFERENCE: (-3.5,), VALUE: (-1.0,)},
    {LOGPROB: (-0.5, -0.25, -1.0), REFERENCE: (-0.5, -1.25, -2.0), VALUE: (0.0, 0.25, 0.5)},
)
SCORES = (2.0, -1.0, 0.5)


def rollout():
    branches = [Branch(tuple(range(5, 5 + len(n[VALUE]))), notes=n) for n in NOTES]
    trees = [Tree((1, 2), tuple(branches[:2]), "a"), Tree((3,), (branches[2],), "b")]
    return Rollout(trees, [list(SCORES[:2]), list(SCORES[2:])], [[True, True], [False]])


def plain_credit(beta, lam, k3, whiten):
    """Advantages and returns of the rollout, token by token."""
    gains, returns = [], []
    for notes, score in zip(NOTES, SCORES, strict=True):
        values, rewards = [*notes[VALUE], 0.0], []
        for mine, other in zip(notes[LOGPROB], notes[REFERENCE], strict=True):
            ratio = mine - other
            rewards.append(-beta * (math.exp(-ratio) - 1 + ratio if k3 else ratio))
        rewards[-1] += score
        deltas = [rewards[t] + values[t + 1] - values[t] for t in range(len(rewards))]
        own = [sum(lam**k * deltas[t + k] for k in range(len(deltas) - t)) for t in range(len(deltas))]
        gains.append(own)
        returns.append([a + v for a, v in zip(own, notes[VALUE], strict=True)])
    if whiten:
        flat = [a for own in gains for a in own]
        mean = sum(flat) / len(flat)
        spread = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat))
        gains = [[(a - mean) / spread for a in own] for own in gains]
    return gains, returns


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("whiten", [True, False])
def test_credit_is_that_of_a_plain_loop(estimator, whiten):
    method = PPO(kl_coefficient=0.3, gae_lambda=0.8, kl_estimator=estimator, whiten=whiten)
    credited = method.credit(rollout(), {})
    gains, returns = plain_credit(0.3, 0.8, estimator == "k3", whiten)
    branches = [branch for tree in credited.trees for branch in tree.branches]
    for branch, gain, target in zip(branches, gains, returns, strict=True):
        assert branch.notes[ADVANTAGE] == pytest.approx(gain, rel=1e-5)
        assert branch.notes[RETURN] == pytest.approx(target, rel=1e-5)
    flat = torch.tensor([r for own in returns for r in own], dtype=torch.float64)
    known = torch.tensor([v for notes in NOTES for v in notes[VALUE]], dtype=torch.float64)
    explained = 1 - float((flat - known).var() / flat.var())
    assert credited.metrics["explained_variance"] == pytest.approx(explained, rel=1e-5)


def test_the_coefficient_follows_its_target():
    mean = (0.5 - 1.0 + 0.5 + 0.0 + 1.0 + 1.0) / 3  # of the answers' log-ratios: 0.667 nats
    near, far = PPO(kl_target=0.6, kl_horizon=30), PPO(kl_target=0.1, kl_horizon=30)
    after = near.credit(rollout(), {}).state
    assert after == {COEFFICIENT: pytest.approx(0.05 * (1 + (mean / 0.6 - 1) * 3 / 30))}
    assert near.credit(rollout(), after).metrics[COEFFICIENT] == after[COEFFICIENT]
    assert far.credit(rollout(), {}).state == {COEFFICIENT: pytest.approx(0.05 * (1 + 0.2 * 3 / 30))}
    assert PPO().credit(rollout(), {}).state == {COEFFICIENT: 0.05}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_kl": 0.5}, r"the KL of answers .* is 0.667, and objective.max_kl=0.5"),
        ({"max_reward": 0.4}, r"the mean reward is 0.5, and objective.max_reward=0.4"),
    ],
)
def test_guards_stop(options, message):
    with pytest.raises(GuardError, match=message):
        PPO(**options).credit(rollout(), {})


def policy():
    model = tiny_llama()
    torch.nn.init.normal_(attach_head(model, "value", torch.Generator()).weight, std=0.2)
    return ModelPolicy(model)


def plain_loss(method, pack, logprobs, values):
    """The equations, token by token."""
    policy_loss = value_loss = clipped = torch.zeros(())
    for place, (now, value) in enumerate(zip(logprobs, values, strict=True)):
        gain, target, before, old = (pack.notes(n)[place] for n in (ADVANTAGE, RETURN, VALUE, LOGPROB))
        ratio = torch.exp(now - old)
        kept = torch.clamp(ratio, 1 - method.clip_range, 1 + method.clip_range)
        policy_loss = policy_loss - torch.min(ratio * gain, kept * gain)
        near = torch.clamp(value, before - method.value_clip, before + method.value_clip)
        value_loss = value_loss + 0.5 * torch.max((value - target) ** 2, (near - target) ** 2)
        clipped = clipped + (ratio * gain > kept * gain).float()
    return policy_loss, value_loss, clipped


def test_the_loss_and_its_gradient_are_those_of_a_plain_loop():
    torch.manual_seed(0)
    method, judge = PPO(value_coefficient=0.3), policy()
    credited = method.credit(rollout(), {})
    pack = Pack.of(credited.trees)
    with torch.no_grad():
        now, values = judge.valued(pack)
    # Ratios below, within and above the clip, for gains of both signs; values on both sides likewise.
    shifts = torch.tensor([0.5, -0.5, 0.05, 0.5, -0.05, -0.5])
    notes = {LOGPROB: now.values - shifts, VALUE: values - torch.tensor([0.5, -0.5, 0.1, -0.1, 0.5, -0.5])}
    pack = Pack.of(pack.noted(notes))
    found = method.loss(judge, pack)
    found.total.backward()
    mine = {name: p.grad.clone() for name, p in judge.model.named_parameters()}
    judge.model.zero_grad()
    logprobs, values = judge.valued(pack)
    policy_loss, value_loss, clipped = plain_loss(method, pack, logprobs.values, values)
    total = policy_loss + 0.3 * value_loss
    total.backward()
    assert found.weight == 6
    assert found.total.item() == pytest.approx(total.item(), rel=1e-5)
    assert float(found.metrics["policy_loss"][0]) == pytest.approx(policy_loss.item(), rel=1e-5)
    assert float(found.metrics["value_loss"][0]) == pytest.approx(value_loss.item(), rel=1e-5)
    assert float(found.metrics["clip_fraction"][0]) == float(clipped)
    assert 0 < clipped < 6
    for name, parameter in judge.model.named_parameters():
        torch.testing.assert_close(mine[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"clip_range": 0}, {"value_clip": -1}, {"value_coefficient": -1}, {"gamma": 0}, {"gae_lambda": 1.5},
     {"kl_target": 0}, {"kl_coefficient": -0.1}, {"rollout_batch_size": 0},
     {"samples_per_prompt": 0}, {"rollout_epochs": 0}],
)  # fmt: skip
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        PPO(**options)
