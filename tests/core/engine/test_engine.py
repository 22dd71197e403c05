"""The loop: exact normalisation whatever the packing, clipping, schedules, and what it reports."""

import copy
import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from transformers.optimization import get_scheduler

from helpers import tiny_llama
from luthier import Branch, LuthierError, ModelPolicy, Tree
from luthier.data.batches import RowBatches
from luthier.data.sampler import Sampler
from luthier.engine import ScheduleConfig
from luthier.engine.loop import Loop, accumulate, normalise
from luthier.engine.monitors import Monitor
from luthier.engine.progress import Plan
from luthier.engine.schedules import SCHEDULES, schedule, warmup_steps
from luthier.trees.tree import cut
from luthier_plugins.objectives.sft import SFT
from luthier_plugins.optimisers.adamw import AdamW


def some_trees(count: int, seed: int = 0) -> list[Tree]:
    """Examples of very different lengths, as in real data."""
    g = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        size = int(torch.randint(low, high, (1,), generator=g))
        return tuple(torch.randint(1, 90, (size,), generator=g).tolist())

    return [Tree(ids(1, 60), (Branch(ids(1, 30)),)) for _ in range(count)]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def gradients(model, trees, pack_tokens):
    model = copy.deepcopy(model)
    policy = ModelPolicy(model)
    packs = [[trees[i] for i in pack] for pack in cut(trees, pack_tokens)]
    weight = accumulate(policy, SFT(), packs, Monitor())
    norm = normalise(list(model.parameters()), weight, None)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, float(norm)


def test_a_steps_gradient_is_the_mean_over_its_supervised_tokens(model):
    # users.md rows 1 and 2: losses averaged per micro-batch weigh short examples too much.
    trees = some_trees(6)
    plain = copy.deepcopy(model)
    total, count = torch.zeros(()), 0
    for tree in trees:
        ids = torch.tensor([tree.prompt + tree.branches[0].ids])
        logprobs = plain(ids).logits.log_softmax(-1)
        start = len(tree.prompt)
        for place in range(start, ids.shape[1]):
            total = total - logprobs[0, place - 1, ids[0, place]]
            count += 1
    (total / count).backward()
    found, _ = gradients(model, trees, pack_tokens=100)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_gradients_do_not_depend_on_pack_tokens(model):
    trees = some_trees(16)
    small, norm_small = gradients(model, trees, 256)
    large, norm_large = gradients(model, trees, 2048)
    assert math.isclose(norm_small, norm_large, rel_tol=1e-5)
    for name in large:
        assert (small[name] - large[name]).norm() <= 1e-5 * large[name].norm(), name


class Watcher:
    """The loop's observer that keeps the reports and nothing else."""

    def __init__(self, reports, losses=()):
        self.reports, self.losses, self.saved = reports, list(losses), []

    def log(self, report):
        self.reports.append(report)

    def evaluate(self, step):
        return self.losses.pop(0)

    def due(self, step):
        return False

    def save(self, progress):
        self.saved.append(progress.step)

    def stopping(self, step):
        return False

    def leave(self, step):
        raise AssertionError


def train(model, trees, pack_tokens, steps=20, max_grad_norm=1.0, log_every=1, lr=1e-2, objective=None):
    model = copy.deepcopy(model)
    optimiser = AdamW(lr=lr).build(list(model.named_parameters()))
    lr_schedule = schedule(ScheduleConfig("cosine", 0.1), optimiser, steps)
    reports = []
    plan = Plan(steps, pack_tokens, max_grad_norm, log_every)
    batches = RowBatches(trees, Sampler(len(trees), 8, True, 0))
    watcher = Watcher(reports)
    Loop(ModelPolicy(model), objective or SFT(), batches, optimiser, lr_schedule, plan, watcher).run()
    return model, reports


def test_losses_do_not_depend_on_pack_tokens(model):
    trees = some_trees(40)
    small, large = (train(model, trees, tokens)[1] for tokens in (256, 2048))
    assert len(small) == 20
    for a, b in zip(small, large, strict=True):
        assert math.isclose(a.loss, b.loss, rel_tol=1e-4)
    assert small[-1].loss < small[0].loss


def test_logging_points_average_over_the_steps_between_them(model):
    trees = some_trees(40)
    _, every = train(model, trees, 512, steps=6, log_every=1)
    _, third = train(model, trees, 512, steps=6, log_every=3)
    assert [report.step for report in third] == [1, 3, 6]
    batches = [Sampler(40, 8, True, 0).batch(step) for step in range(6)]
    weights = [sum(trees[i].scored_tokens for i in batch) for batch in batches]
    window = sum(r.loss * w for r, w in zip(every[3:], weights[3:], strict=True)) / sum(weights[3:])
    assert math.isclose(third[-1].loss, window, rel_tol=1e-5)
    assert third[-1].tokens == sum(trees[i].tokens for b in batches for i in b)
    assert third[-1].epoch == 6 / 5


def test_clipping_bounds_the_gradient_and_reports_the_norm_before():
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([6.0, 0.0, 8.0])
    assert float(normalise([weight], 2.0, 1.0)) == pytest.approx(5.0)
    torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.0, 0.8]), rtol=1e-5, atol=0)


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_its_rows(model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        next(iter(broken.parameters())).fill_(math.nan)
    trees = [dataclasses.replace(tree, origin=f"rows.jsonl:{n}") for n, tree in enumerate(some_trees(8), 1)]
    with pytest.raises(LuthierError, match=r"step 1: the loss is not finite; its rows: rows.jsonl:\d.*lr"):
        train(broken, trees, 100, steps=2)


def test_rows_of_other_packs_are_not_named(model):
    trees = [dataclasses.replace(tree, origin=f"row {n}") for n, tree in enumerate(some_trees(8), 1)]

    class OneBad(SFT):
        def loss(self, policy, pack):
            loss = super().loss(policy, pack)
            bad = any(tree.origin == "row 3" for tree in pack.trees)
            return dataclasses.replace(loss, total=loss.total * (math.inf if bad else 1.0))

    with pytest.raises(LuthierError) as caught:
        train(model, trees, 1, steps=1, objective=OneBad())
    assert "its rows: row 3. The last" in str(caught.value)


def test_weights_stay_as_they_were_before_the_bad_step(model):
    trees, kept = some_trees(8), copy.deepcopy(model)
    optimiser = torch.optim.SGD(kept.parameters(), lr=0.1)
    plan = Plan(3, 512, None, 1)

    class Later(SFT):
        def loss(self, policy, pack):
            loss = super().loss(policy, pack)
            return dataclasses.replace(loss, total=loss.total * (math.nan if optimiser.steps else 1.0))

    optimiser.steps = 0
    after: list[torch.Tensor] = []

    class Counting(Watcher):
        def log(self, report):
            optimiser.steps += 1
            after[:] = [p.detach().clone() for p in kept.parameters()]

    lr_schedule = schedule(ScheduleConfig("constant", 0), optimiser, 3)
    loop = Loop(
        ModelPolicy(kept),
        Later(),
        RowBatches(trees, Sampler(8, 8, False, 0)),
        optimiser,
        lr_schedule,
        plan,
        Counting([]),
    )
    with pytest.raises(LuthierError, match="step 2"):
        loop.run()
    assert all(torch.equal(a, p) for a, p in zip(after, kept.parameters(), strict=True))


def test_patience_ends_a_run_and_the_best_is_kept(model):
    plan = Plan(20, 512, 1.0, 5, evaluate_every=2, patience=2, keep_best=True)
    trees, own = some_trees(8), copy.deepcopy(model)
    optimiser = AdamW().build(list(own.named_parameters()))
    watcher = Watcher([], losses=[3.0, 2.0, 2.5, 2.0])
    progress = Loop(
        ModelPolicy(own), SFT(), RowBatches(trees, Sampler(8, 4, True, 0)), optimiser,
        schedule(ScheduleConfig(), optimiser, 20), plan, watcher,
    ).run()  # fmt: skip
    assert progress.step == 8
    assert (progress.best_step, progress.best_loss) == (4, 2.0)
    assert watcher.saved == [2, 4]


def rates(lr_schedule, optimiser, steps):
    found = []
    for _ in range(steps):
        found.append(lr_schedule.get_last_lr()[0])
        optimiser.step()
        lr_schedule.step()
    return found


def sgd(lr=1.0):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def test_the_first_step_of_a_warm_up_trains():
    optimiser = sgd()
    made = schedule(ScheduleConfig("linear", 0.5), optimiser, 8)
    assert rates(made, optimiser, 8) == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert warmup_steps(ScheduleConfig("linear", 3), 8) == 3
    optimiser = sgd()
    assert rates(schedule(ScheduleConfig("constant", 1), optimiser, 3), optimiser, 3) == [1.0, 1.0, 1.0]
    optimiser = sgd()
    assert rates(schedule(ScheduleConfig("linear", 2), optimiser, 2), optimiser, 2) == [0.5, 1.0]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("lr", [1e-3, 5e-7])
def test_schedules_are_those_of_transformers_but_for_the_warm_up_being_one_step_ahead(name, warmup, lr):
    ours, theirs = sgd(lr), sgd(lr)
    mine = rates(schedule(ScheduleConfig(name, warmup), ours, 12), ours, 12)
    expected = rates(get_scheduler(name, theirs, warmup, 12), theirs, 13)
    warming = 0 if name == "constant" else warmup
    assert mine[:warming] == pytest.approx(expected[1 : warming + 1])
    assert mine[warming:] == pytest.approx(expected[warming:12])


def test_a_schedule_goes_on_from_its_state_and_imports_no_transformers():
    optimiser, other = sgd(), sgd()
    made = schedule(ScheduleConfig("cosine", 3), optimiser, 10)
    begun = rates(made, optimiser, 4)
    again = schedule(ScheduleConfig("cosine", 3), other, 10)
    again.load_state_dict(made.state_dict())
    other.param_groups[0]["lr"] = optimiser.param_groups[0]["lr"]
    whole = sgd()
    assert begun + rates(again, other, 6) == rates(
        schedule(ScheduleConfig("cosine", 3), whole, 10), whole, 10
    )
    code = "import sys, luthier.engine.schedules; assert 'transformers.optimization' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (ScheduleConfig("cosin"), r"schedule.name: unknown schedule 'cosin': did you mean 'cosine'"),
        (ScheduleConfig("linear", -1), r"schedule.warmup: -1 is negative"),
    ],
)
def test_an_unknown_schedule_is_told(settings, told):
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(LuthierError, match=told):
        schedule(settings, optimiser, 8)
