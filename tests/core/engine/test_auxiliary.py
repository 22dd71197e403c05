"""Objectives combined: the sum of means, whatever the packs; one forward pass; what is refused."""

import pytest
import torch

from helpers import tiny_llama, tiny_tokenizer
from luthier import Codec, ConfigError, ModelPolicy, Pack, Row
from luthier.engine.auxiliary import WithAuxiliary, with_auxiliary
from luthier.engine.loop import accumulate
from luthier.engine.monitors import Monitor
from luthier.engine.pooling import pooled
from luthier.system.processes import Processes
from luthier_plugins.objectives.sft import SFT
from luthier_plugins.objectives.simpo import SimPO
from luthier_toolkits.preference.pair_rows import pair_tree

PAIRS = [("a", " b c d", " e"), ("x y", " z", " one two"), ("k", " l m n o p", " q r")]


def trees():
    codec = Codec(tiny_tokenizer())
    return [
        pair_tree(Row({"prompt": p, "chosen": c, "rejected": r}, f"row {n}"), codec)
        for n, (p, c, r) in enumerate(PAIRS, 1)
    ]


def gradient_of(objective, packs):
    """The gradient of a step, divided once, and its mean loss."""
    policy, meter = ModelPolicy(tiny_llama()), Monitor()
    known = pooled(policy, objective, packs, Processes())
    weight = accumulate(policy, objective, packs, meter, known=known)
    gradients = torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])
    return gradients / weight, meter.drain()


def test_each_part_is_a_mean_over_the_step_by_its_own_weight():
    step = trees()
    pairs, paired = gradient_of(SimPO(), [step])
    chosen, supervised = gradient_of(SFT(), [list(Pack.of(step).only(0).trees)])
    for packs in ([step], [[tree] for tree in step], [step[:1], step[1:]]):
        both, means = gradient_of(with_auxiliary(SimPO(), {"sft": 0.3}), packs)
        expected = pairs + 0.3 * chosen
        assert (both - expected).norm() < 1e-5 * expected.norm()
        assert means["loss"] == pytest.approx(paired["loss"] + 0.3 * supervised["loss"], rel=1e-5)
        assert means["sft"] == pytest.approx(supervised["loss"], rel=1e-5)
        assert means["pair_accuracy"] == paired["pair_accuracy"]


def test_the_pack_runs_once(monkeypatch):
    runs = []
    plain = ModelPolicy.logprobs
    monkeypatch.setattr(ModelPolicy, "logprobs", lambda self, pack: runs.append(pack) or plain(self, pack))
    with_auxiliary(SimPO(), {"sft": 0.3}).loss(ModelPolicy(tiny_llama()), Pack.of(trees()))
    assert len(runs) == 1


def test_options_of_the_other_objective_may_be_given():
    objective = with_auxiliary(SimPO(), {"sft": {"weight": 0.5, "supervise": "last"}})
    assert isinstance(objective, WithAuxiliary)
    assert objective.others == {"sft": (0.5, SFT(supervise="last"))}
    assert with_auxiliary(SimPO(), {}) == SimPO()


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ({"sft": 0}, r"auxiliary\.sft: expected a weight above 0"),
        ({"sft": "much"}, r"auxiliary\.sft: expected a weight above 0"),
        ({"sft": {"supervise": "last"}}, r"auxiliary\.sft: expected a weight above 0"),
        ({"sft": {"weight": 1.0, "superwise": "last"}}, "did you mean 'supervise'"),
        ({"dpo": 1.0}, r"auxiliary\.dpo: dpo is not about one completion"),
        ({"stf": 1.0}, "did you mean 'sft'"),
    ],
)
def test_what_cannot_be_combined_is_refused(others, told):
    with pytest.raises((ConfigError, RuntimeError), match=told):
        with_auxiliary(SimPO(), others)
