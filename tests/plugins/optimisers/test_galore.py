"""GaLore: one step by hand, whose turn it is, moments in a new basis, what is projected, what is skipped."""

import json
import math

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from luthier import ConfigError
from luthier.runs.state import flatten, unflatten
from luthier.testing import OptimiserSuite
from luthier_plugins.optimisers.galore.galore import GaLore
from luthier_plugins.optimisers.galore.subspace import exact_basis


class TestLayerwise(OptimiserSuite):
    """The checks of every optimiser, on the one that steps inside the backward pass."""

    method = GaLore
    options = {"rank": 4, "refresh_every": 3, "layerwise": True}


SHAPES = {
    "embed_tokens.weight": (30, 12),
    "layers.0.up_proj.weight": (20, 12),
    "layers.0.down_proj.weight": (12, 20),
    "layers.0.norm.weight": (12,),
    "layers.1.up_proj.weight": (20, 12),
    "layers.1.down_proj.weight": (12, 20),
    "lm_head.weight": (30, 12),
}
PROJECTED = [name for name in SHAPES if "_proj" in name]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def parameters():
    return {
        name: nn.Parameter(torch.randn(s, generator=generator(n)))
        for n, (name, s) in enumerate(SHAPES.items())
    }


def gradient(name, step):
    return torch.randn(SHAPES[name], generator=generator(1000 * step + list(SHAPES).index(name)))


def take(optimiser, named, step, broken=()):
    for name, p in named.items():
        p.grad = gradient(name, step)
        if name in broken:
            p.grad[0] = math.nan
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def built(named, **options):
    return GaLore(**{"rank": 4, "refresh_every": 8, "lr": 1e-2, **options}).build(iter(named.items()))


@pytest.mark.parametrize("tall", [False, True])
def test_one_step_is_the_papers(tall):
    # G = (3, 4)ᵀ (1, −2, 0) has rank 1: U₁ = (0.6, 0.8), R = 5·(1, −2, 0). After one step the bias-corrected
    # moments are R and R², so N̂ = (1, −1, 0), whatever the sign of U₁ is, and the step is s·U₁ N̂.
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    grad = torch.tensor([[3.0, -6.0, 0.0], [4.0, -8.0, 0.0]])
    p = nn.Parameter(weight.T.clone() if tall else weight.clone())
    options = {"rank": 1, "lr": 0.1, "weight_decay": 0.5, "scale": 0.25, "svd": "exact"}
    optimiser = GaLore(**options).build([("w.weight", p)])
    p.grad = grad.T.clone() if tall else grad
    optimiser.step()
    step = torch.tensor([[0.6, -0.6, 0.0], [0.8, -0.8, 0.0]])
    expected = (1 - 0.1 * 0.5) * weight - 0.1 * 0.25 * step
    torch.testing.assert_close(p.detach(), expected.T if tall else expected)


def test_what_is_not_projected_gets_plain_adamw():
    named, others = parameters(), parameters()
    optimiser = built(named, weight_decay=0.1, no_decay=["lm_head"])
    decayed = [p for name, p in others.items() if name == "embed_tokens.weight"]
    stay = [others["layers.0.norm.weight"], others["lm_head.weight"]]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": stay, "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    for step in range(5):
        take(optimiser, named, step)
        take(plain, others, step)
    for name in SHAPES.keys() - set(PROJECTED):
        torch.testing.assert_close(named[name], others[name], msg=name)
    assert [set(optimiser.state[named[name]]) for name in PROJECTED] == [
        {"calls", "step", "exp_avg", "exp_avg_sq", "basis"}
    ] * 4


def bases(optimiser, named):
    return {name: optimiser.state[named[name]]["basis"].clone() for name in PROJECTED}


def refreshed(optimiser, named, steps):
    """Whose basis changed, step by step."""
    found, before = [], {}
    for step in range(steps):
        take(optimiser, named, step)
        after = bases(optimiser, named)
        found.append([n for n in PROJECTED if n not in before or not torch.equal(before[n], after[n])])
        before = after
    return found


@pytest.mark.parametrize("svd", ["subspace", "exact"])
def test_matrices_take_turns(svd):
    named = parameters()
    a, b, c, d = PROJECTED
    # Four matrices over eight steps: all begin, then one every other step.
    expected = [PROJECTED, [], [b], [], [c], [], [d], [], [a], [], [b], []]
    assert refreshed(built(named, svd=svd), named, 12) == expected


def test_no_step_renews_more_than_its_share():
    named = parameters()
    assert [len(names) for names in refreshed(built(named, refresh_every=2), named, 6)] == [4, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("name", ["layers.0.up_proj.weight", "layers.0.down_proj.weight"])
def test_moments_go_along_into_a_new_basis(name, rotated):
    p = nn.Parameter(torch.zeros(SHAPES[name]))
    optimiser = GaLore(rank=4, refresh_every=2, rotate_moments=rotated).build([(name, p)])
    for step in range(3):
        before = {key: value.clone() for key, value in optimiser.state[p].items()}
        p.grad = gradient(name, step)
        optimiser.step()
    state, grad = optimiser.state[p], gradient(name, 2)
    assert not torch.equal(state["basis"], before["basis"])
    turn = state["basis"].T @ before["basis"] if rotated else torch.eye(4)
    low = state["basis"].T @ (grad.T if grad.shape[0] > grad.shape[1] else grad)
    first = 0.9 * (turn @ before["exp_avg"]) + 0.1 * low
    second = 0.999 * (turn**2 @ before["exp_avg_sq"]) + 0.001 * low**2
    torch.testing.assert_close(state["exp_avg"], first, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state["exp_avg_sq"], second, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("at", [0, 1, 4], ids=["first", "between", "at_a_refresh"])
@pytest.mark.parametrize("svd", ["subspace", "exact"])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(at, svd):
    # users.md row 16: the decomposition of such a gradient fails, or makes everything NaN.
    named, broken = parameters(), [PROJECTED[2], "embed_tokens.weight"]
    optimiser = built(named, svd=svd, weight_decay=0.1)
    for step in range(at):
        take(optimiser, named, step)
    before = {name: p.detach().clone() for name, p in named.items()}
    states = [{k: v.clone() for k, v in optimiser.state[named[name]].items()} for name in broken]
    take(optimiser, named, at, broken)
    assert {name for name in named if torch.equal(before[name], named[name])} == set(broken)
    for name, old in zip(broken, states, strict=True):
        new = optimiser.state[named[name]]
        assert all(torch.equal(new[key], old[key]) for key in old if key != "calls")
    assert optimiser.skipped == 2
    for step in range(at + 1, 12):
        take(optimiser, named, step)
    assert optimiser.skipped == 2
    for name, p in named.items():
        assert p.isfinite().all()
        assert not torch.equal(before[name], p)


def read_back(state):
    """What a checkpoint makes of `state`: JSON and safetensors."""
    tensors = {}
    values = json.loads(json.dumps(flatten(state, tensors, "optimiser")))
    return unflatten(values, load(save(tensors)))


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_bit_identical(layerwise, dtype):
    # users.md row 18. Step 5 is amid the cycle of every matrix, and two have had a second basis.
    def start(weights=None):
        named = {n: nn.Parameter(p.detach().to(dtype)) for n, p in (weights or parameters()).items()}
        optimiser = built(named, layerwise=layerwise)
        return named, optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (1 + step))

    def go(named, optimiser, rates, steps):
        for step in steps:
            # A loss whose gradient is what `take` sets, so that the hooks see it.
            sum((p.float() * gradient(name, step)).sum() for name, p in named.items()).backward()
            optimiser.step()
            optimiser.zero_grad()
            rates.step()

    whole, optimiser, rates = start()
    go(whole, optimiser, rates, range(12))
    first, optimiser, rates = start()
    go(first, optimiser, rates, range(5))
    second, resumed, again = start(first)
    resumed.load_state_dict(read_back(optimiser.state_dict()))
    again.load_state_dict(read_back(rates.state_dict()))
    go(second, resumed, again, range(5, 12))
    for name, p in whole.items():
        assert torch.equal(p, second[name]), name


def test_nothing_is_drawn_from_the_global_generator():
    named, before = parameters(), torch.get_rng_state()
    optimiser = built(named)
    for step in range(3):
        take(optimiser, named, step)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", PROJECTED),
        ("up_proj", [name for name in PROJECTED if "up" in name]),
        (["layers.1.up_proj", "down_proj"], PROJECTED[1:]),
        (r".*\.0\..*", PROJECTED[:2]),
        (["lm_head"], ["lm_head.weight"]),
    ],
)
def test_targets_are_chosen_as_adapters_are(targets, expected):
    named = parameters()
    optimiser = built(named, targets=targets)
    found = [p for group in optimiser.param_groups if group["rank"] for p in group["params"]]
    assert [name for name, p in named.items() if any(p is one for one in found)] == expected
    method = GaLore(rank=4, targets=targets)
    for name, p in named.items():
        short, long = min(p.shape), max(p.shape)
        expected_bytes = 4 * (short * 4 + 2 * 4 * long) if name in expected else 8 * p.numel()
        assert method.state_bytes(name, tuple(p.shape)) == expected_bytes


@pytest.mark.parametrize(
    ("names", "projected"),
    [
        (["model.embed_tokens", "lm_head", "score", "transformer.wte", "transformer.wpe", "embed_out"], []),
        (["bert.embeddings.word_embeddings", "vision.patch_embed.proj"], []),
        (
            ["h.0.attn.c_attn", "model.layers.0.mlp.gate_proj"],
            ["h.0.attn.c_attn", "model.layers.0.mlp.gate_proj"],
        ),
    ],
)
def test_embeddings_and_heads_are_known_by_name(names, projected):
    found = [name for name in names if GaLore(rank=2).state_bytes(f"{name}.weight", (10, 10)) != 800]
    assert found == projected


def test_learning_rates_and_decay_stay_with_their_parameters():
    named = parameters()
    optimiser = built(named, lr_factors={"up_proj": 16.0}, weight_decay=0.1, no_decay=["down_proj"])
    found = {}
    for group in optimiser.param_groups:
        for name, p in named.items():
            if any(p is one for one in group["params"]):
                found[name] = (group["lr"], group["weight_decay"], group["rank"])
    assert found["layers.1.up_proj.weight"] == (0.16, 0.1, 4)
    assert found["layers.1.down_proj.weight"] == (0.01, 0.0, 4)
    assert found["layers.0.norm.weight"] == (0.01, 0.0, 0)
    assert found["lm_head.weight"] == (0.01, 0.1, 0)
    assert optimiser.param_groups[0]["lr"] == 0.01  # what a report shows


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rank": 13}, r"rank=13 is more than the shorter side of layers.0.up_proj.weight \(20×12\): lower"),
        ({"targets": ["up_prj"]}, r"'up_prj' matches no linear layer: did you mean 'up_proj'"),
        ({"targets": ["norm"]}, r"'norm' matches no linear layer"),
        ({"targets": "nothing.*"}, r"'nothing\.\*' fully matches no linear layer"),
        ({"targets": []}, r"targets=\[\] chooses nothing"),
        ({"targets": 3}, r"targets=3: expected names"),
    ],
)
def test_what_cannot_be_projected_is_told(options, told):
    with pytest.raises(ConfigError, match=told) as caught:
        built(parameters(), **options)
    assert "\n" not in str(caught.value)


def test_matrices_smaller_than_the_rank_are_left_as_they_are(caplog):
    """A router of 3 experts beside matrices of 12; asked for by its name, it is refused."""
    router = nn.Parameter(torch.randn(3, 12, generator=generator(0)))
    named = {**parameters(), "layers.0.router.weight": router}
    optimiser = built(named, rank=4)
    (ranks,) = ({g["rank"] for g in optimiser.param_groups if any(p is router for p in g["params"])},)
    assert ranks == {0}
    assert "smaller than rank=4, so not projected: layers.0.router.weight" in caplog.text
    assert GaLore(rank=4).state_bytes("layers.0.router.weight", (3, 12)) == 8 * 3 * 12
    with pytest.raises(ConfigError, match=r"more than the shorter side of layers.0.router.weight \(3×12\)"):
        built(named, rank=4, targets=["router"])


def test_a_model_without_a_linear_layer_is_told():
    with pytest.raises(ConfigError, match="no matrix of a linear layer trains"):
        GaLore().build([("embed_tokens.weight", nn.Parameter(torch.zeros(4, 4)))])


@pytest.mark.parametrize("bad", [{"rank": 0}, {"refresh_every": 0}, {"scale": 0.0}, {"lr": -1.0}])
def test_values_that_cannot_train_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        GaLore(**bad)


def test_a_rank_of_the_whole_side_projects_nothing_away():
    name, p = "w.weight", nn.Parameter(torch.zeros(12, 20))
    optimiser = GaLore(rank=12).build([(name, p)])
    p.grad = gradient("layers.0.down_proj.weight", 0)
    optimiser.step()
    basis = optimiser.state[p]["basis"]
    torch.testing.assert_close(basis @ (basis.T @ p.grad), p.grad, rtol=1e-4, atol=1e-5)


def test_the_basis_is_nearly_that_of_the_gradient():
    p = nn.Parameter(torch.zeros(64, 96))
    optimiser = GaLore(rank=8).build([("w.weight", p)])
    left, right = torch.randn(64, 20, generator=generator(1)), torch.randn(20, 96, generator=generator(2))
    p.grad = left * torch.exp(-torch.arange(20) / 4) @ right
    optimiser.step()
    best = exact_basis(p.grad, 8)
    captured = (optimiser.state[p]["basis"].T @ p.grad).norm() / (best.T @ p.grad).norm()
    assert captured**2 >= 0.99
