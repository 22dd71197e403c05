"""Steps inside the backward pass: the same as after it, gradients gone at once, several packs, the loop."""

import copy
import dataclasses
import logging
import math

import pytest
import torch
from torch import nn

from helpers import tiny_llama
from luthier import Branch, ConfigError, InBackward, LuthierError, ModelPolicy, Tree, compose
from luthier.data.batches import RowBatches
from luthier.data.sampler import Sampler
from luthier.engine import ScheduleConfig
from luthier.engine.loop import Loop, accumulate
from luthier.engine.monitors import Monitor
from luthier.engine.progress import Plan
from luthier.engine.schedules import schedule
from luthier.registry.compatibility import check_processes
from luthier.system.processes import Processes
from luthier_plugins.objectives.sft import SFT
from luthier_plugins.optimisers.adamw import AdamW
from luthier_plugins.optimisers.galore.galore import GaLore
from luthier_plugins.optimisers.galore.layerwise import ProjectedAdamInBackward
from luthier_plugins.optimisers.galore.projected_adam import ProjectedAdam
from luthier_plugins.optimisers.galore.subspace import project


def layers(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 6))


def optimiser_of(cls, model, refresh_every=3):
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "rank": 4}, {"params": vectors, "rank": 0}]
    groups = [{**group, "lr": 0.02, "weight_decay": 0.1} for group in groups]
    return cls(groups, betas=(0.9, 0.999), eps=1e-8, refresh_every=refresh_every, scale=0.5)


def loss_of(model, step, size=8):
    x = torch.randn(size, 12, generator=torch.Generator().manual_seed(step))
    return model(x).square().sum()


def test_it_is_what_the_loop_looks_for():
    assert isinstance(optimiser_of(ProjectedAdamInBackward, layers()), InBackward)
    assert not isinstance(optimiser_of(ProjectedAdam, layers()), InBackward)


def test_with_one_pack_it_is_the_step_after_the_backward_pass():
    one, other = layers(), layers()
    plain, inside = optimiser_of(ProjectedAdam, one), optimiser_of(ProjectedAdamInBackward, other)
    for step in range(8):
        loss_of(one, step).backward()
        plain.step()
        plain.zero_grad()
        inside.announce(last=True, weight=1.0)
        loss_of(other, step).backward()
        moved = [p.detach().clone() for p in other.parameters()]
        inside.step()
        assert all(torch.equal(p, before) for p, before in zip(other.parameters(), moved, strict=True))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_packs_add_up_and_are_divided_once():
    one, other = layers(), layers()
    plain = optimiser_of(ProjectedAdam, one, refresh_every=100)
    inside = optimiser_of(ProjectedAdamInBackward, other, refresh_every=100)
    # The first step, of one pack, gives both the same bases; the second has three.
    for step, packs in enumerate([[0], [1, 2, 3]]):
        for number, pack in enumerate(packs, 1):
            loss_of(one, pack).backward()
            inside.announce(last=number == len(packs), weight=2.5 * number)
            loss_of(other, pack).backward()
        for p in one.parameters():
            p.grad /= 2.5 * len(packs)
        plain.step()
        inside.step()
        used = [
            project(plain.state[p]["basis"], p.grad) if "basis" in plain.state[p] else p.grad
            for p in one.parameters()
        ]
        norm = torch.stack([gradient.norm() for gradient in used]).norm()
        torch.testing.assert_close(inside.gradient_norm(), norm, rtol=1e-5, atol=0, msg=str(step))
        plain.zero_grad()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        for key, value in plain.state[a].items():
            torch.testing.assert_close(inside.state[b][key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_the_basis_is_that_of_the_steps_first_pack():
    one, other = layers(), layers()
    plain, inside = optimiser_of(ProjectedAdam, one), optimiser_of(ProjectedAdamInBackward, other)
    loss_of(one, 0).backward()
    plain.step()
    for pack in range(2):
        inside.announce(last=pack == 1, weight=1.0)
        loss_of(other, pack).backward()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert ("basis" in plain.state[a]) == ("basis" in inside.state[b]) == (a.ndim == 2)
        if a.ndim == 2:
            assert torch.equal(plain.state[a]["basis"], inside.state[b]["basis"])


@pytest.mark.parametrize("last", [True, False])
def test_gradients_are_gone_before_the_layer_below_has_one(last):
    model = layers()
    inside = optimiser_of(ProjectedAdamInBackward, model)
    seen = []

    def look(gradient):
        # The gradient of the first layer's output: everything above it has been through.
        above = [*model[2].parameters(), *model[4].parameters()]
        seen.append([p.grad is None for p in above])

    inside.announce(last=last, weight=1.0)
    x = torch.randn(3, 12)
    hidden = model[0](x)
    hidden.register_hook(look)
    model[1:](hidden).sum().backward()
    # Weight, bias, weight, bias: vectors keep theirs until the last pack.
    assert seen == [[True, last, True, last]]
    assert [p.grad is None for p in model.parameters()] == [True, last] * 3


def test_what_the_last_pack_does_not_reach_moves_all_the_same():
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    inside = optimiser_of(ProjectedAdamInBackward, model)
    before = [p.detach().clone() for p in model.parameters()]
    for number, layer in enumerate(model):
        inside.announce(last=number == 1, weight=1.0 + number)
        layer(torch.ones(2, 8)).square().sum().backward()
    still = [torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert still == [True, True, False, False]
    inside.step()
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert [int(inside.state[p]["step"]) for p in model.parameters()] == [1] * 4


def test_an_announcement_is_for_one_step():
    model = layers()
    inside = optimiser_of(ProjectedAdamInBackward, model)
    inside.announce(last=True, weight=1.0)
    loss_of(model, 0).backward()
    inside.step()
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model, 1).backward()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("bad", [0, 1])
def test_one_pack_that_is_not_finite_skips_the_step(bad):
    model = layers()
    inside = optimiser_of(ProjectedAdamInBackward, model)
    before = [p.detach().clone() for p in model.parameters()]
    for pack in range(2):
        inside.announce(last=pack == 1, weight=1.0)
        (loss_of(model, pack) * (math.nan if pack == bad else 1.0)).backward()
    inside.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert inside.skipped == 6
    assert inside.gradient_norm() == 0
    inside.announce(last=True, weight=1.0)
    loss_of(model, 2).backward()
    assert inside.skipped == 6
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def some_trees(count=12):
    g = torch.Generator().manual_seed(0)

    def ids(low, high):
        size = int(torch.randint(low, high, (1,), generator=g))
        return tuple(torch.randint(1, 90, (size,), generator=g).tolist())

    return [Tree(ids(1, 40), (Branch(ids(1, 20)),), origin=f"row {n}") for n in range(count)]


class Watcher:
    """The loop's observer that keeps the reports and saves when asked to."""

    def __init__(self, save_at=0):
        self.reports, self.save_at, self.saved = [], save_at, []

    def log(self, report):
        self.reports.append(report)

    def due(self, step):
        return step == self.save_at

    def save(self, progress):
        self.saved.append(progress.step)

    def stopping(self, step):
        return False


def run(
    model, method, pack_tokens=4096, objective=None, steps=6, watcher=None, log_every=1, max_grad_norm=None
):
    model = copy.deepcopy(model)
    optimiser = method.build(list(model.named_parameters()))
    watcher = watcher or Watcher()
    plan = Plan(steps, pack_tokens, max_grad_norm, log_every, skips_non_finite=method.skips_non_finite)
    lr_schedule = schedule(ScheduleConfig("cosine", 0.1), optimiser, steps)
    trees = some_trees()
    Loop(
        ModelPolicy(model), objective or SFT(), RowBatches(trees, Sampler(len(trees), 6, True, 0)), optimiser,
        lr_schedule, plan, watcher,
    ).run()  # fmt: skip
    return model, watcher.reports


GALORE = GaLore(rank=8, refresh_every=3, lr=1e-2, scale=1.0)
LAYERWISE = dataclasses.replace(GALORE, layerwise=True)


@pytest.fixture(scope="module")
def model():
    # Tied: the head's gradient and the embedding's arrive as one.
    return tiny_llama(tie_word_embeddings=True)


def test_in_the_loop_both_ways_are_one(model):
    plain, reports = run(model, GALORE)
    inside, others = run(model, LAYERWISE)
    for a, b in zip(reports, others, strict=True):
        assert math.isclose(a.loss, b.loss, rel_tol=1e-4)
    assert reports[-1].loss < 0.9 * reports[0].loss
    assert 0 < others[0].grad_norm < reports[0].grad_norm  # what was projected away is not in it
    for p, q in zip(plain.parameters(), inside.parameters(), strict=True):
        assert (p - q).norm() <= 1e-3 * p.norm()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.slow
def test_it_learns_from_several_packs_a_step(model, checkpointing):
    model = copy.deepcopy(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    _, reports = run(model, LAYERWISE, pack_tokens=64, steps=10)
    assert reports[-1].loss < 0.8 * reports[0].loss
    whole, again = run(model, LAYERWISE, pack_tokens=64, steps=10)[0], run(model, LAYERWISE, 64, steps=10)[0]
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))


class Bad(torch.autograd.Function):
    """Adds nothing to a loss, and something that is not finite to one element of a weight's gradient."""

    @staticmethod
    def forward(ctx, weight, bad):
        ctx.save_for_backward(weight)
        ctx.bad = bad
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        gradient = torch.zeros_like(ctx.saved_tensors[0])
        gradient[1, 2] = ctx.bad
        return gradient, None


@dataclasses.dataclass(frozen=True)
class BadGradient(SFT):
    """The loss is fine, its gradient is not, at the second pack."""

    bad: float = math.nan
    packs: list = dataclasses.field(default_factory=list)

    def loss(self, policy, pack):
        loss = super().loss(policy, pack)
        self.packs.append(pack)
        if len(self.packs) != 2:
            return loss
        weight = policy.model.model.layers[0].mlp.up_proj.weight
        return dataclasses.replace(loss, total=loss.total + Bad.apply(weight, self.bad))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize(
    ("method", "max_grad_norm"),
    [(GALORE, None), (GALORE, 1.0), (LAYERWISE, None)],
    ids=["after", "clip", "inside"],
)
def test_a_gradient_that_is_not_finite_is_left_out_and_told_once(model, caplog, method, max_grad_norm, bad):
    objective = BadGradient(bad=bad)
    with caplog.at_level(logging.WARNING, "luthier"):
        trained, reports = run(model, method, objective=objective, max_grad_norm=max_grad_norm)
    # Clipping is by the norm of all, so that it is the whole step.
    count = 1 if max_grad_norm is None else len(list(model.parameters()))
    assert [r.metrics.get("skipped_updates") for r in reports] == [None, *[count] * 5]
    (told,) = [one.getMessage() for one in caplog.records if "not finite" in one.getMessage()]
    assert told == f"up to step 2, {count} times a parameter stayed: its gradient was not finite"
    assert reports[-1].loss < reports[0].loss
    assert all(p.isfinite().all() for p in trained.parameters())


def test_elsewhere_it_ends_the_run(model):
    with pytest.raises(LuthierError, match="step 2: the gradient is not finite"):
        run(model, AdamW(), objective=BadGradient())


class BadLoss(SFT):
    """The loss of a pack with one of `rows` is not a number."""

    def __init__(self, rows):
        object.__setattr__(self, "rows", rows)

    def loss(self, policy, pack):
        loss = super().loss(policy, pack)
        bad = any(tree.origin in self.rows for tree in pack.trees)
        return dataclasses.replace(loss, total=loss.total * (math.nan if bad else 1.0))


@pytest.mark.parametrize("method", [GALORE, LAYERWISE], ids=["after", "inside"])
@pytest.mark.parametrize("save_at", [0, 2], ids=["logging", "saving"])
def test_a_loss_that_is_not_finite_ends_the_run_before_anything_is_saved(model, method, save_at):
    row = f"row {Sampler(12, 6, True, 0).batch(1)[0]}"  # of the second step, which is no logging point
    watcher = Watcher(save_at)
    with pytest.raises(LuthierError, match=rf"step 2: the loss is not finite; its rows: {row}\."):
        run(model, method, 1, BadLoss({row}), steps=3, watcher=watcher, log_every=3)
    assert watcher.saved == []
    assert [report.step for report in watcher.reports] == [1]


def test_every_pack_is_announced_before_its_backward_pass(model):
    events, weights = [], []

    class Announced:
        def announce(self, last, weight):
            events.append((last, weight))

        def gradient_norm(self):
            raise AssertionError

    class Weighing(SFT):
        def loss(self, policy, pack):
            loss = super().loss(policy, pack)
            weights.append(loss.weight)
            loss.total.register_hook(lambda gradient: events.append("backward"))
            return loss

    packs = [[tree] for tree in some_trees(3)]
    total = accumulate(
        ModelPolicy(copy.deepcopy(model)), Weighing(), packs, Monitor(), in_backward=Announced()
    )
    a, b, c = weights
    assert events == [
        (False, a), "backward", (False, a + b), "backward", (True, a + b + c), "backward",
    ]  # fmt: skip
    assert total == a + b + c


@pytest.mark.parametrize(
    ("method", "processes", "told"),
    [
        (LAYERWISE, Processes(0, 2), r"inside the backward pass, .*2 processes: .*optimiser.layerwise=false"),
        (GALORE, Processes(0, 2, sharded=True), r"needs whole parameters, and FSDP2 .*without --use_fsdp"),
        (GALORE, Processes(0, 2), None),
        (LAYERWISE, Processes(), None),
        (AdamW(), Processes(0, 2, sharded=True), None),
    ],
)
def test_processes_it_cannot_serve_are_refused(method, processes, told):
    if told is None:
        check_processes("galore", method, processes)
        return
    with pytest.raises(ConfigError, match=told) as caught:
        check_processes("galore", method, processes)
    assert "\n" not in str(caught.value)


def test_clipping_by_a_norm_nobody_knows_is_refused_when_composed():
    run = [
        "model.path=x",
        "model.device=cpu",
        "data=jsonl",
        "data.path=x",
        "adapter=full",
        "optimiser=galore",
    ]
    told = r"optimiser=galore moves .*: set max_grad_norm=null, or optimiser.layerwise=false"
    with pytest.raises(ConfigError, match=told):
        compose("train", [*run, "optimiser.layerwise=true"])
    assert compose("train", [*run, "optimiser.layerwise=true", "max_grad_norm=null"]).max_grad_norm is None
    assert compose("train", run).max_grad_norm == 1.0
