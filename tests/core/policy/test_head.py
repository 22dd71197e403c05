"""Chunked log-probabilities against log_softmax over all logits."""

import itertools

import pytest
import torch

from luthier.policy.head import Head, token_logprobs
from luthier.policy.row_blocks import LOGITS_BYTES

CASES = list(itertools.product([None, 2.0], [1.0, 0.4], [False, True]))


def naive(hidden, weight, bias, targets, softcap, scale):
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def inputs(dtype, bias, n=11, d=6, v=23):
    torch.manual_seed(0)
    hidden = (2 * torch.randn(n, d)).to(dtype).requires_grad_()
    weight = torch.randn(v, d).to(dtype).requires_grad_()
    return hidden, weight, torch.randn(v).to(dtype).requires_grad_() if bias else None, torch.randint(v, (n,))


@pytest.mark.parametrize(("softcap", "scale", "bias"), CASES)
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_values_and_gradients_are_those_of_all_logits(softcap, scale, bias, chunk, dtype, limit):
    hidden, weight, b, targets = inputs(dtype, bias)
    trained = [x for x in (hidden, weight, b) if x is not None]
    found = token_logprobs(hidden, weight, b, targets, softcap, scale, chunk)
    expected = naive(hidden, weight, b, targets, softcap, scale)
    upstream = torch.linspace(-1, 2, len(targets), dtype=dtype)
    pairs = [(found, expected)]
    pairs += zip(
        torch.autograd.grad(found, trained, upstream),
        torch.autograd.grad(expected, trained, upstream),
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=limit * float(theirs.detach().abs().max()))


@pytest.mark.parametrize(("softcap", "scale", "bias"), CASES)
def test_half_precision_stays_near_float32(softcap, scale, bias):
    hidden, weight, b, targets = inputs(torch.bfloat16, bias)
    wide = [None if x is None else x.detach().float().requires_grad_() for x in (hidden, weight, b)]
    found = token_logprobs(hidden, weight, b, targets, softcap, scale, 4)
    expected = naive(*wide, targets, softcap, scale)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    assert (found <= 0).all()
    ours = torch.autograd.grad(found.sum(), (hidden, weight))
    for grad, theirs in zip(ours, torch.autograd.grad(expected.sum(), wide[:2]), strict=True):
        assert (grad.float() - theirs).abs().max() <= 0.02 * theirs.abs().max()


def test_half_precision_rounds_away_less_than_a_16_bit_product():
    torch.manual_seed(0)
    hidden, weight = torch.randn(200, 64).bfloat16(), (0.6 * torch.randn(500, 64)).bfloat16()
    targets = (hidden @ weight.T).float().softmax(-1).multinomial(1)[:, 0]  # as likely as in real text
    exact = naive(hidden.float(), weight.float(), None, targets, None, 1.0)
    plain = naive(hidden, weight, None, targets, None, 1.0).float() - exact
    ours = token_logprobs(hidden, weight, None, targets) - exact
    assert ours.square().mean() < 0.3 * plain.square().mean()
    widened = (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0] - exact
    assert ours.square().mean() < 0.7 * widened.square().mean()


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_only_what_is_trained_gets_a_gradient(trained):
    hidden, weight, _, targets = inputs(torch.float64, bias=False)
    (weight if trained == "hidden" else hidden).requires_grad_(False)
    found = token_logprobs(hidden, weight, None, targets)
    expected = naive(hidden, weight, None, targets, None, 1.0)
    x = hidden if trained == "hidden" else weight
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x), torch.autograd.grad(expected.sum(), x))


def test_extreme_logits_stay_finite_and_exact():
    hidden = torch.tensor([[300.0], [-300.0], [0.0]], dtype=torch.float32, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]])
    values = token_logprobs(hidden, weight, None, torch.tensor([2, 2, 1]))
    torch.testing.assert_close(values, torch.tensor([-600.0, 0.0, -torch.log(torch.tensor(3.0)).item()]))
    values.sum().backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[-2.0], [0.0], [0.0]]))


def test_no_rows_give_no_values():
    hidden, weight, _, targets = inputs(torch.float32, bias=False, n=0)
    values = token_logprobs(hidden, weight, None, targets)
    assert values.shape == (0,)
    values.sum().backward()
    assert hidden.grad is not None


def test_the_vocabulary_wide_block_is_never_larger_than_a_chunk(monkeypatch):
    hidden, weight, _, targets = inputs(torch.float32, bias=False, n=40, v=50)
    monkeypatch.setitem(LOGITS_BYTES, "cpu", 4 * 50 * 3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        token_logprobs(hidden, weight, None, targets)
    assert max(shape.numel() for shape in kept) == weight.numel()


def test_a_head_follows_autocast():
    hidden, *_, targets = inputs(torch.float32, bias=True)
    linear = torch.nn.Linear(6, 23)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = Head(linear).logprobs(hidden, targets)
    high = Head(linear).logprobs(hidden, targets)
    assert low.dtype == high.dtype == torch.float32
    assert 0 < (low - high).abs().max() < 0.05
    low.sum().backward()
    assert linear.weight.grad.dtype == torch.float32
