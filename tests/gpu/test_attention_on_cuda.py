"""Compiled flex attention over trees of every shape, beside the tiled function of the CPU in fp64."""

import pytest
import torch

from luthier import Branch, Pack, Tree
from luthier.policy import masked_attention
from luthier.policy.masked_attention import masked_attention as masked
from luthier.policy.tile_attention import Terms, tile_attention


def spans(tokens):
    """Return a layout of about so many tokens: a prompt with three children, a pair, a plain text."""
    part = max(1, tokens // 9)
    trees = [
        Tree((1,) * (3 * part), (Branch((2,) * part), Branch((3,) * part), Branch((4,) * (part + 1)))),
        Tree((5,) * part, (Branch((6,) * part), Branch((7,) * (part // 2 + 1)))),
        Tree((8,) * part, (Branch((9,) * part),)),
    ]
    return Pack.of(trees).spans


def inputs_of(layout, size, heads, groups):
    generator = torch.Generator().manual_seed(0)
    count = layout.segments[-1].stop
    return [
        torch.randn(1, many, count, size, generator=generator, dtype=torch.float64)
        for many in (heads, heads // groups, heads // groups)
    ]


def both_passes(attend, inputs, upstream):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = attend(*leaves)
    return [out, *torch.autograd.grad(out, leaves, upstream.to(out))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("size", "heads", "groups", "tokens", "window", "softcap"),
    [
        (64, 4, 1, 18, None, None),
        (64, 4, 4, 130, None, None),
        (64, 6, 3, 700, 64, None),
        (128, 7, 7, 1100, None, None),
        (128, 8, 4, 4096, None, None),
        (128, 8, 4, 4096, 1000, None),
        (256, 4, 4, 900, 128, 50.0),
        (256, 8, 2, 600, None, 30.0),
    ],
)
def test_values_and_gradients_are_those_of_the_tiles(
    cuda, dtype, size, heads, groups, tokens, window, softcap
):
    layout, terms = spans(tokens), Terms(size**-0.5, window, softcap)
    inputs = inputs_of(layout, size, heads, groups)
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def tiles(query, key, value):
        return tile_attention(query[0], key[0], value[0], layout, terms).transpose(0, 1)[None]

    expected = both_passes(tiles, inputs, upstream)
    found = both_passes(
        lambda *rows: masked(*rows, layout, terms), [x.to(cuda, dtype) for x in inputs], upstream.to(cuda)
    )
    allowed = 5e-3 if dtype == torch.float32 else 5e-2  # TF32 where torch's kernels use it
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double().cpu() - theirs).abs().max() <= allowed * theirs.abs().max()


def test_packs_of_all_lengths_are_compiled_in_two_graphs_a_kind(cuda):
    if cuda.type != "cuda":
        pytest.skip("compiles nothing in a rehearsal; tests/core/policy/test_masked_attention.py counts")
    from torch._dynamo.utils import counters

    counters.clear()
    masked_attention._compiled.cache_clear()
    for tokens in range(40, 2000, 97):
        layout = spans(tokens)
        rows = [x.to(cuda, torch.bfloat16) for x in inputs_of(layout, 64, 4, 2)]
        with torch.no_grad():
            masked(*rows, layout, Terms(0.125))
    assert counters["stats"]["unique_graphs"] <= 2
