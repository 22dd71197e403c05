"""The policy: its check at start, padded fallback, native attention, and what it hands to objectives."""

import copy
import logging

import pytest
import torch
import transformers as tf

from helpers import plain_values
from luthier import Branch, Logprobs, ModelError, ModelPolicy, Pack, Tree
from luthier.policy import attention
from luthier.policy.attention import NAME
from luthier.policy.forward import PaddedForward, PaddedLogits, TreeForward

LLAMA = tf.LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=97,
    initializer_range=0.15,
    pad_token_id=0,
)
# Models that cannot take token trees, each for a reason of its own.
STRANGERS = {
    "sinks": (
        tf.GptOssConfig(
            hidden_size=32,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=97,
            num_local_experts=2,
            num_experts_per_tok=1,
            initializer_range=0.15,
            sliding_window=4,
        ),
        "s_aux",
    ),
    "alibi": (tf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=97, initializer_range=0.15), ""),
    "recurrent": (
        tf.MambaConfig(
            hidden_size=32, state_size=4, num_hidden_layers=2, vocab_size=97, initializer_range=0.15
        ),
        "",
    ),
}


def ids(count: int, seed: int) -> tuple[int, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 97, (count,), generator=g).tolist())


TREES = [
    Tree(ids(7, 1), (Branch(ids(6, 2), (True, False) * 3), Branch(ids(1, 3)))),
    Tree(ids(3, 4)),
    Tree(ids(1, 5), (Branch(ids(4, 6)),)),
]


def build(config):
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()


def gradient(model, values):
    model.zero_grad()
    (values * torch.linspace(-1, 2, len(values))).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", STRANGERS)
def test_a_model_that_cannot_take_trees_runs_padded_with_a_warning(name, caplog):
    config, reason = STRANGERS[name]
    model = build(config)
    expected = plain_values(model, TREES)
    expected_gradient = gradient(model, expected)
    policy = ModelPolicy(model)
    with caplog.at_level(logging.WARNING, "luthier"):
        policy.check()
    message = next(record.getMessage() for record in caplog.records if record.name == "luthier")
    assert "cannot run token trees" in message
    assert reason in message
    assert "padding" in message
    assert isinstance(policy._forward, PaddedForward)
    values = policy.logprobs(Pack.of(TREES)).values
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
    found = gradient(model, values)
    assert (found - expected_gradient).abs().max() <= 1e-5 * expected_gradient.abs().max()


def test_trees_and_padded_rows_give_the_same_hidden_states():
    model, pack = build(LLAMA), Pack.of(TREES)
    everywhere = torch.arange(pack.tokens)
    policy = ModelPolicy(model)
    tree = policy.hidden(pack, everywhere)
    padded = PaddedForward(model, policy._forward.head)
    padded.attach()
    torch.testing.assert_close(padded.hidden(pack, everywhere), tree, rtol=0, atol=1e-5)


class Doubled(torch.nn.Linear):
    """A head that no configuration describes."""

    def forward(self, x):
        return 2 * super().forward(x)


class Wrapped(torch.nn.Module):
    """A head that is not even a linear layer, as an adapter might leave it."""

    def __init__(self, linear):
        super().__init__()
        self.inner = linear

    def forward(self, x):
        return self.inner(x) + 0.1 * x.sum(-1, keepdim=True).tanh() * self.inner.weight[:, 0]


@pytest.mark.parametrize("kind", ["doubled", "wrapped"])
def test_a_head_that_is_not_as_described_is_run_by_the_model(kind):
    model = build(LLAMA)
    if kind == "doubled":
        head = Doubled(32, 97, bias=False)
        head.weight = model.lm_head.weight
    else:
        head = Wrapped(model.lm_head)
    model.lm_head = head
    expected = plain_values(model, TREES)
    policy = ModelPolicy(model)
    policy.check()
    assert isinstance(policy._forward, PaddedLogits)
    torch.testing.assert_close(policy.logprobs(Pack.of(TREES)).values, expected, rtol=0, atol=1e-5)


def test_a_model_that_depends_on_its_batch_is_refused():
    model = build(LLAMA)
    model.model.norm.register_forward_hook(lambda module, args, out: out + 0.1 * out.sum((0, 1)))
    with pytest.raises(ModelError, match="other values in a batch"):
        ModelPolicy(model).check()


class Twisted(torch.autograd.Function):
    """The identity, with another gradient: a kernel that learns wrongly."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.5 * grad


def test_a_wrong_backward_pass_is_found(monkeypatch, caplog):
    rightly = attention.tree_attention

    def learns_wrongly(*args, **options):
        out, nothing = rightly(*args, **options)
        return Twisted.apply(out), nothing

    model = build(LLAMA)
    policy = ModelPolicy(model)
    assert policy.path == "tree"
    monkeypatch.setattr(attention, "tree_attention", learns_wrongly)
    with caplog.at_level(logging.WARNING, "luthier"):
        policy.check()
    assert policy.path == "padded"
    assert "gradients stray by" in caplog.text


def test_a_model_without_a_backward_pass_is_checked_by_its_values():
    class OneWay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise NotImplementedError("this kernel cannot")

    model = build(LLAMA)
    model.model.norm.register_forward_hook(lambda module, args, out: OneWay.apply(out))
    policy = ModelPolicy(model)
    policy.check()
    assert policy.path == "tree"


def test_the_check_leaves_no_trace():
    model = build(LLAMA).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    policy = ModelPolicy(model)
    policy.check()
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert isinstance(policy._forward, TreeForward)


def test_native_attention_is_for_generation_and_ends_after_an_error():
    model = build(LLAMA)
    prompt = torch.tensor([ids(5, 1)])
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    native = model.config._attn_implementation
    expected = model.generate(prompt, **options)
    policy = ModelPolicy(model)
    policy.check()
    assert model.config._attn_implementation == NAME
    with policy.native_attention():
        assert model.config._attn_implementation == native
        assert torch.equal(model.generate(prompt, **options), expected)
    with pytest.raises(KeyboardInterrupt), policy.native_attention():
        raise KeyboardInterrupt
    assert model.config._attn_implementation == NAME
    # A second policy over the same model still knows the way back.
    with ModelPolicy(model).native_attention():
        assert model.config._attn_implementation == native


def test_chunked_attention_is_not_taken_for_causal():
    # Such chunks are longer than the check's rows and exist only in the model's own mask.
    model = build(LLAMA)
    model.config.attention_chunk_size = 4096
    policy = ModelPolicy(model)
    policy.check()
    assert isinstance(policy._forward, PaddedForward)


@pytest.mark.parametrize("mode", ["weights", "autocast"])
def test_bfloat16_stays_near_float32(mode):
    model, pack = build(LLAMA), Pack.of(TREES)
    expected = ModelPolicy(model).logprobs(pack).values
    low = (
        ModelPolicy(model.to(torch.bfloat16))
        if mode == "weights"
        else ModelPolicy(model, autocast_dtype=torch.bfloat16)
    )
    low.check()
    assert isinstance(low._forward, TreeForward)
    values = low.logprobs(pack).values
    assert values.dtype == torch.float32
    assert 0 < (values - expected).abs().max() < 0.3
    values.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_sums_and_means_per_child():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    logprobs = Logprobs(values, (0, 3, 3, 4))
    assert logprobs.lengths == (3, 0, 1)
    assert logprobs.sums().tolist() == [6.0, 0.0, 4.0]
    assert logprobs.means().tolist() == [2.0, 0.0, 4.0]
    (logprobs.means() * torch.tensor([3.0, 5.0, 7.0])).sum().backward()
    assert values.grad.tolist() == [1.0, 1.0, 1.0, 7.0]


def test_a_pack_without_children_gives_nothing():
    logprobs = ModelPolicy(build(LLAMA)).logprobs(Pack.of([Tree((3, 4))]))
    assert logprobs.sums().shape == logprobs.means().shape == (0,)
