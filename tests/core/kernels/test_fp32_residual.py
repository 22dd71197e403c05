"""A residual stream in fp32: closer to the exact values, in every family whose norms are fused."""

import copy

import pytest
import torch
import transformers as tf

from helpers import tiny_gpt2, tiny_llama
from luthier import Branch, ModelPolicy, Pack, Tree
from luthier.kernels.fp32_residual import wants_wide, widen
from luthier.kernels.fused import fuse, unfused
from luthier.kernels.record import is_wide
from luthier.policy import attention
from luthier.policy.tile_attention import Terms, tile_attention
from luthier_plugins.adapters.lora import LoRA

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "initializer_range": 0.15,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": tf.LlamaConfig(**SIZES),
    "qwen3": tf.Qwen3Config(**SIZES, head_dim=16),
    "gemma2": tf.Gemma2Config(**SIZES, head_dim=16),
}
IDS = torch.randint(3, 97, (8, 40), generator=torch.Generator().manual_seed(3)).tolist()
PACK = Pack.of([Tree(tuple(row[:10]), (Branch(tuple(row[10:])),)) for row in IDS])


def build(family):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family])).to(torch.bfloat16).eval()
    with torch.no_grad():  # a stream that is large beside what a layer adds, as in trained models
        model.get_input_embeddings().weight.mul_(8)
    LoRA(rank=4, dropout=0.0).attach(model, torch.Generator().manual_seed(0))
    return model


@torch.no_grad()
def error(model, exact):
    return float((ModelPolicy(model).logprobs(PACK).values.double() - exact).pow(2).mean().sqrt())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_log_probabilities_come_closer(family):
    model = build(family)
    with torch.no_grad():  # of the same weights: what is left is rounding on the way
        exact = ModelPolicy(copy.deepcopy(model).double()).logprobs(PACK).values
    narrow, wide = copy.deepcopy(model), copy.deepcopy(model)
    fuse(narrow)
    assert widen(wide, fuse(wide))
    assert is_wide(wide)
    assert not is_wide(narrow)
    assert error(wide, exact) < 0.85 * error(narrow, exact)


def test_the_stream_is_wide_and_what_layers_compute_in_is_not():
    model = build("llama")
    widen(model, fuse(model))
    seen = {}
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(lambda _, given: seen.update(stream=given[0].dtype))
    layer.self_attn.q_proj.register_forward_pre_hook(lambda _, given: seen.update(query=given[0].dtype))
    model.lm_head.register_forward_pre_hook(lambda _, given: seen.update(head=given[0].dtype))
    policy = ModelPolicy(model)
    loss = policy.logprobs(PACK).values.sum()
    with policy.native_attention(), torch.no_grad():
        model(torch.tensor(IDS[:1]))
    assert seen == {"stream": torch.float32, "query": torch.bfloat16, "head": torch.bfloat16}
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def test_generation_and_plain_forwards_still_run():
    model = build("llama")
    ids = torch.tensor(IDS[:1])
    with torch.no_grad():
        before = model(ids).logits
        widen(model, fuse(model))
        out = model.generate(ids, max_new_tokens=3, do_sample=False)
        with unfused(model):
            assert torch.equal(model(ids).logits, before), "unfused, a model is as transformers wrote it"
    assert out.shape[1] == ids.shape[1] + 3


@pytest.mark.parametrize(
    "model", [tiny_llama(), tiny_gpt2().to(torch.bfloat16)], ids=["in fp32", "norms of another kind"]
)
def test_what_cannot_be_widened_is_left_alone(model):
    model.requires_grad_(False)
    assert not widen(model, fuse(model))
    assert not is_wide(model)


def test_a_reference_asks_for_it_unless_the_person_says_otherwise():
    assert wants_wide(None, needs_reference=True)
    assert not wants_wide(None, needs_reference=False)
    assert not wants_wide(False, needs_reference=True)
    assert wants_wide(True, needs_reference=False)


def test_norms_round_once():
    model = build("llama")
    widen(model, fuse(model))
    norm = model.model.norm
    norm.weight.data.uniform_(0.5, 2.0)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    exact = torch.nn.functional.rms_norm(x, (64,), norm.weight.float(), norm.variance_epsilon)
    assert torch.equal(norm(x), exact.to(torch.bfloat16))


def test_scores_are_exact():
    layout = PACK.spans
    tokens = layout.segments[-1].stop
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, tokens, 16, generator=generator).mul_(3).bfloat16()
    value.copy_(value.sign())  # all that is rounded is weights and the result
    exact = tile_attention(query.double(), key.double(), value.double(), layout, Terms(1.0))
    narrow, wide = (tile_attention(query, key, value, layout, Terms(1.0, wide=w)) for w in (False, True))
    assert wide.dtype == torch.bfloat16
    errors = [(one - exact).abs().mean() for one in (narrow, wide)]
    assert errors[1] < 0.2 * errors[0]


def test_gradients_through_exact_scores_are_those_of_fp32():
    layout = PACK.spans
    tokens = layout.segments[-1].stop
    inputs = torch.randn(3, 2, tokens, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = []
    for dtype, terms in ((torch.bfloat16, Terms(0.5, wide=True)), (torch.float32, Terms(0.5))):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        tile_attention(*leaves, layout, terms).float().square().sum().backward()
        found.append([leaf.grad.float() for leaf in leaves])
    for low, full in zip(*found, strict=True):
        assert (low - full).norm() < 0.01 * full.norm()


def test_a_wide_model_asks_for_exact_scores(monkeypatch):
    seen = []
    monkeypatch.setattr(attention, "Terms", lambda *a, **k: seen.append(k["wide"]) or Terms(*a, **k))
    model = build("llama")
    fused = fuse(model)
    policy = ModelPolicy(model)
    policy.logprobs(PACK)
    widen(model, fused)
    policy.logprobs(PACK)
    assert seen == [False] * 12 + [True] * 12
