"""GaLore against its authors' package, galore-torch: the same weights over three projections."""

import warnings

import pytest
import torch
from torch import nn

from luthier_plugins.optimisers.galore.galore import GaLore

galore_torch = pytest.importorskip("galore_torch")
# They add eps before they correct the second moment's bias, Luthier and torch after: tiny, it is the same.
PROBLEM = {"lr": 0.02, "rank": 4, "gap": 5, "scale": 0.25, "eps": 1e-12}


def start(shape):
    """Weights, and a minimum whose distance has well separated singular values."""
    m, n = shape
    g = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(m, min(shape), generator=g))[0]
    right = torch.linalg.qr(torch.randn(n, min(shape), generator=g))[0]
    values = 12.0 * 0.7 ** torch.arange(min(shape))
    weight = torch.randn(shape, generator=g)
    return nn.Parameter(weight.clone()), weight + (left * values) @ right.T


def trajectory(optimiser, weight, minimum, steps=15):
    """The weight after every step along the gradient of a quadratic: bases at steps 0, 5 and 10."""
    found = []
    for _ in range(steps):
        weight.grad = weight.detach() - minimum
        optimiser.step()
        found.append(weight.detach().clone())
    return found


def theirs(weight, **more):
    group = {
        "params": [weight], "rank": PROBLEM["rank"], "update_proj_gap": PROBLEM["gap"],
        "scale": PROBLEM["scale"], "proj_type": "std",
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return galore_torch.GaLoreAdamW([group], lr=PROBLEM["lr"], eps=PROBLEM["eps"], **more)


def ours(weight, **more):
    options = {"svd": "exact", "rotate_moments": False, **more}
    return GaLore(
        lr=PROBLEM["lr"],
        eps=PROBLEM["eps"],
        rank=PROBLEM["rank"],
        refresh_every=PROBLEM["gap"],
        scale=PROBLEM["scale"],
        **options,
    )


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (8, 40)])
def test_the_same_trajectory_over_three_projections(shape):
    # Of a square matrix they project the right side, and the paper (and Luthier) the left one.
    weight, minimum = start(shape)
    mine, _ = start(shape)
    expected = trajectory(theirs(weight), weight, minimum)
    found = trajectory(ours(mine).build([("w.weight", mine)]), mine, minimum)
    assert (expected[-1] - expected[0]).norm() > 0.5
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a - b).norm() <= 1e-5 * b.norm(), f"step {step}"


def test_the_rest_is_adam_as_theirs():
    bias, mine = nn.Parameter(torch.ones(7)), nn.Parameter(torch.ones(7))
    minimum = torch.arange(7.0) + 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimiser = galore_torch.GaLoreAdamW([{"params": [bias]}], lr=PROBLEM["lr"], eps=PROBLEM["eps"])
    expected = trajectory(optimiser, bias, minimum)
    matrix, _ = start((12, 20))  # something to project
    built = ours(mine).build([("w.weight", matrix), ("w.bias", mine)])
    for a, b in zip(trajectory(built, mine, minimum), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


def test_moments_that_turn_with_the_basis_go_another_way():
    # A check of the oracle: it can tell.
    weight, minimum = start((12, 20))
    mine, _ = start((12, 20))
    expected = trajectory(theirs(weight), weight, minimum)
    found = trajectory(ours(mine, rotate_moments=True).build([("w.weight", mine)]), mine, minimum)
    assert (found[4] - expected[4]).norm() <= 1e-5 * expected[4].norm()
    assert (found[-1] - expected[-1]).norm() > 1e-4 * expected[-1].norm()
