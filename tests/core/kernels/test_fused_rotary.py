"""Attention that keeps queries and keys as they were before their rotation, and rotates them again."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from luthier import Branch, Pack, Tree
from luthier.kernels.fused_rotary import rotate, turned
from luthier.kernels.record import note
from luthier.policy.attention import tree_attention

TREES = [Tree((1,) * 9, (Branch((2,) * 5), Branch((3,) * 4))), Tree((1,) * 3, (Branch((2,) * 6),))]
SPANS = Pack.of(TREES).spans
COUNT = SPANS.segments[-1].stop


def drawn(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, COUNT, heads, 8, generator=g, dtype=dtype).transpose(1, 2).requires_grad_()
        for heads in (4, 2, 2)
    )
    angles = 7 * torch.rand(1, COUNT, 4, generator=g, dtype=dtype).repeat(1, 1, 2)
    return (q, k, v), angles.cos(), angles.sin()


def attend(rotation, inputs, cos, sin):
    q, k = rotation(inputs[0], inputs[1], cos, sin)
    return tree_attention(torch.nn.Identity(), q, k, inputs[2], None, tree_spans=SPANS)[0]


READS = torch.nn.Identity()
note(READS, turns=True)


def ours(*args):
    return rotate(apply_rotary_pos_emb, READS, *args)


def kept_by(rotation, inputs, cos, sin):
    """Return the storages that are kept for the backward pass."""
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.add(t.untyped_storage().data_ptr()) or t, lambda t: t
    ):
        out = attend(rotation, inputs, cos, sin)
    del out
    return kept


def test_values_and_gradients_are_those_of_attention_behind_a_rotation():
    inputs, cos, sin = drawn()
    found, expected = attend(ours, inputs, cos, sin), attend(apply_rotary_pos_emb, inputs, cos, sin)
    torch.testing.assert_close(found, expected)
    above = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad(out, inputs, above) for out in (found, expected)]
    for mine, other in zip(*gradients, strict=True):
        assert other.abs().max() > 0.1
        torch.testing.assert_close(mine, other)


def test_no_rotated_copy_is_kept():
    inputs, cos, sin = drawn()
    own = {x.untyped_storage().data_ptr() for x in (*inputs, cos, sin)}
    assert kept_by(ours, inputs, cos, sin) <= own
    assert len(kept_by(apply_rotary_pos_emb, inputs, cos, sin) - own) >= 2


@pytest.mark.parametrize("which", [0, 1])
def test_what_was_written_to_since_is_kept_as_it_is(which):
    def scaled(rotation):
        def rotate_and_scale(*args):
            pair = rotation(*args)
            pair[which].mul_(1.5)
            return pair

        return rotate_and_scale

    inputs, cos, sin = drawn()
    pair = scaled(ours)(*inputs[:2], cos, sin)
    assert turned(pair[which]) is None
    assert turned(pair[1 - which]) is not None
    found, expected = (attend(scaled(one), inputs, cos, sin) for one in (ours, apply_rotary_pos_emb))
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(out.square().sum(), inputs) for out in (found, expected)]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)


def test_under_autocast_the_rotated_ones_are_kept():
    inputs, cos, sin = drawn(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(ours, inputs, cos, sin)
    assert found.dtype == torch.bfloat16
    expected = attend(apply_rotary_pos_emb, inputs, cos, sin)
    gradients = [torch.autograd.grad(out.float().square().sum(), inputs) for out in (found, expected)]
    for mine, other in zip(*gradients, strict=True):
        assert (mine - other).norm() < 0.03 * other.norm()
