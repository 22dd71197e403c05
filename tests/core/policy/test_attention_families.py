"""Tree attention in real architectures: values and gradients equal to one plain sequence at a time."""

import copy
import importlib.util

import pytest
import torch
import transformers as tf
from torch.nn.attention.flex_attention import create_mask

from helpers import plain_values
from luthier import Branch, ModelError, ModelPolicy, Pack, Tree
from luthier.policy import masked_attention
from luthier.policy.attention import NAME, tree_attention
from luthier.policy.block_mask import visible as sees
from luthier.policy.forward import TreeForward
from luthier.policy.tile_attention import Terms, tile_attention
from luthier.trees import layout as spans

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = ["sliding_attention", "full_attention"]
FAMILIES = {
    "llama": tf.LlamaConfig(**COMMON),
    "llama_tied_bias": tf.LlamaConfig(**COMMON, tie_word_embeddings=True, attention_bias=True),
    "mistral_window": tf.MistralConfig(**COMMON, sliding_window=4),
    "qwen2": tf.Qwen2Config(**COMMON),
    "qwen3": tf.Qwen3Config(**COMMON, head_dim=16),
    "gemma2": tf.Gemma2Config(
        **COMMON,
        head_dim=16,
        sliding_window=3,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        layer_types=MIXED,
    ),
    "gemma3": tf.Gemma3TextConfig(**COMMON, head_dim=16, sliding_window=5, layer_types=MIXED),
    "phi3": tf.Phi3Config(**COMMON),
    "gpt2": tf.GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        vocab_size=97,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "smollm3": tf.SmolLM3Config(**COMMON, no_rope_layers=[1, 0]),
    "cohere": tf.CohereConfig(**COMMON, logit_scale=0.5),
    "granite": tf.GraniteConfig(**COMMON, logits_scaling=2.0, attention_multiplier=0.3),
}


def ids(count: int, seed: int) -> tuple[int, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 97, (count,), generator=g).tolist())


TREES = [
    Tree(ids(7, 1), (Branch(ids(6, 2)), Branch(ids(1, 3)), Branch(ids(9, 4), (True, False, True) * 3))),
    Tree(ids(4, 5)),
    Tree(ids(1, 6), (Branch(ids(11, 7)),)),
    Tree(ids(8, 8), (Branch(ids(2, 9), (False, False)), Branch(ids(5, 10)))),
]


def build(config):
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()


def gradients(model, values):
    weights = torch.linspace(-1, 2, len(values))
    model.zero_grad()
    (values * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_equal_plain_forwards(family, monkeypatch):
    # users.md row 37: packed examples that see one another.
    monkeypatch.setattr(spans, "TILE_ROWS", 3)  # several tiles a segment
    model = build(FAMILIES[family])
    expected = plain_values(model, TREES)
    expected_gradients = gradients(model, expected)
    policy = ModelPolicy(model)
    policy.check()
    assert isinstance(policy._forward, TreeForward)
    found = policy.logprobs(Pack.of(TREES))
    torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-5)
    assert found.lengths == (6, 1, 6, 11, 0, 5)
    found_gradients = gradients(model, found.values)
    assert found_gradients.keys() == expected_gradients.keys()
    largest = max(float(grad.abs().max()) for grad in expected_gradients.values())
    for name, grad in expected_gradients.items():
        atol = 1e-5 * max(float(grad.abs().max()), 1e-2 * largest)
        torch.testing.assert_close(
            found_gradients[name], grad, rtol=0, atol=atol, msg=lambda m, n=name: f"{n} {m}"
        )


def test_gradient_checkpointing_changes_nothing():
    model = build(FAMILIES["gemma3"])
    policy, pack = ModelPolicy(model), Pack.of(TREES)
    expected = gradients(model, policy.logprobs(pack).values)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    for name, grad in gradients(model, policy.logprobs(pack).values).items():
        torch.testing.assert_close(grad, expected[name], msg=name)


def dense(query, key, value, visible, terms):
    """Attention by the book, over an explicit (T, T) mask; any dtype."""
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    scores = query @ key.transpose(1, 2) * terms.scale
    if terms.softcap:
        scores = terms.softcap * (scores / terms.softcap).tanh()
    return (scores.masked_fill(~visible, float("-inf")).softmax(-1) @ value).transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 3, 200])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_tiles_equal_attention_over_the_mask_that_flex_uses(dtype, window, softcap):
    # Ties the CPU path to the predicate that builds CUDA's block mask; long enough for several tiles.
    trees = [Tree((1,) * 150, (Branch((2,) * 140), Branch((3,) * 20))), *TREES]
    layout = Pack.of(trees).spans
    count, terms = layout.segments[-1].stop, Terms(0.4, window, softcap)
    visible = create_mask(sees(layout.table(torch.device("cpu")), window), 1, 1, count, count, device="cpu")[
        0, 0
    ]
    torch.manual_seed(0)
    inputs = [torch.randn(heads, count, 8, dtype=dtype).requires_grad_() for heads in (4, 2, 2)]
    upstream = torch.randn(count, 4, 8)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    expected = dense(*wide, visible, terms)
    found = tile_attention(*inputs, layout, terms)
    limit = 2e-6 if dtype == torch.float32 else 0.02
    pairs = [(found, expected)]
    grads = torch.autograd.grad(found, inputs, upstream.to(dtype))
    pairs += zip(grads, torch.autograd.grad(expected, wide, upstream), strict=True)
    for ours, theirs in pairs:
        assert ours.dtype == dtype
        assert (ours.float() - theirs).abs().max() <= limit * theirs.abs().max()


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
@pytest.mark.parametrize("way", ["_flex", "_dense"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_what_accelerators_run_equals_the_tiles(monkeypatch, way, window, softcap):
    # Uncompiled, flex_attention's forward runs on CPU too: the same mask, grouping and softcap.
    monkeypatch.setattr(masked_attention, "_compiled", lambda *_: masked_attention._attend)
    layout, terms = Pack.of(TREES).spans, Terms(0.4, window, softcap)
    torch.manual_seed(0)
    sizes = (layout.segments[-1].stop, 16)
    inputs = [torch.randn(1, heads, *sizes, requires_grad=way == "_dense") for heads in (4, 2, 2)]
    found = getattr(masked_attention, way)(*inputs, layout, terms)
    expected = tile_attention(*(x[0] for x in inputs), layout, terms).transpose(0, 1)[None]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if way == "_flex":
        return
    upstream = torch.randn_like(expected)
    pairs = zip(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("there", "way"), [(True, "_flex"), (False, "_dense")])
def test_flex_runs_where_triton_is(monkeypatch, there, way):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if there else None)
    monkeypatch.setattr(masked_attention, way, lambda *_: way)
    assert masked_attention.masked_attention(*[torch.zeros(1)] * 3, None, None) == way


def test_dropout_is_applied_and_its_gradient_is_that_of_the_same_mask():
    layout, terms = Pack.of(TREES).spans, Terms(0.5, dropout=0.3)
    torch.manual_seed(0)
    inputs = [
        torch.randn(2, layout.segments[-1].stop, 4, dtype=torch.float64).requires_grad_() for _ in range(3)
    ]

    def attend(*tensors):
        torch.manual_seed(7)
        return tile_attention(*tensors, layout, terms)

    torch.manual_seed(7)
    assert not torch.equal(attend(*inputs), tile_attention(*inputs, layout, Terms(0.5)))
    direction = [torch.randn_like(x) for x in inputs]
    step = 1e-3
    ahead, behind = (
        attend(*(x.detach() + sign * step * d for x, d in zip(inputs, direction, strict=True))).sum()
        for sign in (1, -1)
    )
    grads = torch.autograd.grad(attend(*inputs).sum(), inputs)
    slope = sum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True))
    assert slope == pytest.approx(float(ahead - behind) / (2 * step), rel=1e-5)


def test_a_plain_forward_under_tree_attention_says_what_to_do():
    model = build(FAMILIES["llama"])
    ModelPolicy(model)
    with pytest.raises(ModelError, match="native_attention"):
        model(torch.tensor([[3, 4]]))


@pytest.mark.parametrize("name", ["s_aux", "position_bias"])
def test_what_a_tree_cannot_express_is_refused(name):
    x = torch.zeros(1, 2, 3, 4)
    layout = spans.TreeSpans((spans.Segment(0, 3),))
    with pytest.raises(ModelError, match=f"'{name}', which '{NAME}'"):
        tree_attention(torch.nn.Identity(), x, x, x, None, tree_spans=layout, **{name: x})
