"""Fused frozen parts: the same values and gradients, found by structure, and left alone where they differ."""

import copy

import pytest
import torch
import transformers as tf

import luthier.kernels.matmul as products
from helpers import tiny_gpt2, tiny_llama
from luthier import compose
from luthier.kernels.fused import fuse, unfused
from luthier_plugins.adapters.lora import LoRA

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "initializer_range": 0.15,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": tf.LlamaConfig(**SIZES),
    "qwen3": tf.Qwen3Config(**SIZES, head_dim=8),
    "gemma2": tf.Gemma2Config(**SIZES, head_dim=8),
    "phi3": tf.Phi3Config(**SIZES),
    "mistral": tf.MistralConfig(**SIZES),
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
IDS = torch.randint(3, 97, (2, 37), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=[True, False], ids=["onednn", "mkl"])
def kernels(request, monkeypatch):
    """Run once with the products of each library, whatever processor this is."""
    monkeypatch.setattr("luthier.kernels.fused.one_dnn_wins", lambda: request.param)
    monkeypatch.setattr(products, "one_dnn_wins", lambda: request.param)


def build(family):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family])).train()
    with torch.no_grad():  # norms start at one, or zero, where a wrong one would go unseen
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def adapted(model, targets):
    """LoRA with B away from zero, so that its gradients all count."""
    LoRA(rank=4, dropout=0.0, targets=targets).attach(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return model


def logits_and_gradients(model):
    logits = model(IDS, use_cache=False).logits
    model.zero_grad()
    logits.float().log_softmax(-1)[..., 5].sum().backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_same(found, expected, bound):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= bound * b.abs().max()


@pytest.mark.parametrize("targets", ["attention", "all-linear"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("kernels")
def test_a_fused_model_computes_the_same(family, targets):
    if targets == "attention":
        targets = ["qkv_proj", "o_proj"] if family == "phi3" else ATTENTION
    model = adapted(build(family).double().float(), targets)
    expected = logits_and_gradients(model)
    fused = fuse(model)
    kinds = list(fused.values())
    assert kinds.count("mlp") == (2 if targets == ATTENTION else 0)
    assert kinds.count("rotary") == 2
    assert_same(logits_and_gradients(model), expected, 2e-6)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(logits_and_gradients(model), expected, 2e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_norms_are_fused_in_bfloat16_and_keep_no_wide_copy(family):
    model = adapted(build(family).bfloat16(), ATTENTION)
    expected = logits_and_gradients(model)
    before = saved_bytes(model)
    fused = fuse(model)
    norms = {name for name, _ in model.named_modules() if name.rpartition(".")[2].endswith("norm")}
    assert {name for name, kind in fused.items() if kind == "norm"} == norms
    assert_same(logits_and_gradients(model), expected, 0.03)
    assert saved_bytes(model) < 0.9 * before


def saved_bytes(model):
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _ = model(IDS, use_cache=False).logits.sum()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(size for place, size in sizes.items() if place not in weights)


def test_the_product_of_the_two_branches_is_not_kept():
    model = adapted(tiny_llama(), ATTENTION)
    before = saved_bytes(model)
    fuse(model)
    rows = IDS.numel()
    assert before - saved_bytes(model) >= 2 * rows * 48 * 4  # one block of intermediate size a layer


def test_a_module_that_computes_something_else_is_left_alone(monkeypatch):
    model = tiny_llama().requires_grad_(False)
    own = type(model.model.layers[0].mlp).forward
    names = {f"model.layers.{layer}.mlp" for layer in (0, 1)}
    assert names <= fuse(copy.deepcopy(model)).keys()
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", lambda self, x: own(self, x) * 1.001)
    assert not names & fuse(model).keys()
    assert not any("forward" in vars(model.get_submodule(name)) for name in names)


@pytest.mark.parametrize(
    "config",
    [tf.CohereConfig(**SIZES), tf.PhiConfig(**SIZES, partial_rotary_factor=0.5), tf.GPTNeoXConfig(**SIZES)],
    ids=["interleaved", "partial", "partial and packed"],
)
def test_another_rotation_is_left_alone_or_computes_the_same(config):
    model = tf.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    expected = model(IDS, use_cache=False).logits
    kinds = fuse(model).values()
    assert ("rotary" in kinds) == (config.model_type != "cohere")
    assert_same([model(IDS, use_cache=False).logits], [expected], 2e-6)


def test_a_gradient_that_differs_is_noticed(monkeypatch):
    """The same value, but half of its gradient: no fused part may restore the other half."""
    model = tiny_llama().requires_grad_(False)
    mlp = type(model.model.layers[0].mlp)
    own = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: (own(self, x) + own(self, x.detach())) / 2)
    assert "mlp" not in fuse(model).values()


def test_a_module_with_its_own_forward_or_a_listened_child_is_left_alone():
    model = tiny_llama().requires_grad_(False)
    first, second = (layer.mlp for layer in model.model.layers)
    first.forward = mine = lambda x: x
    second.down_proj.register_forward_hook(lambda module, args, out: out)
    assert "mlp" not in fuse(model).values()
    assert first.forward is mine


def test_weights_that_train_get_their_gradients():
    model = tiny_llama().train()
    expected = logits_and_gradients(model)
    assert set(fuse(model).values()) == {"rotary"}  # which has no weights
    assert_same(logits_and_gradients(model), expected, 1e-6)
    model.requires_grad_(False)
    assert "mlp" in fuse(model).values()
    model.requires_grad_(True)  # a fused part steps back
    assert_same(logits_and_gradients(model), expected, 1e-6)


def test_an_adapter_attached_later_takes_part():
    model = tiny_llama().requires_grad_(False)
    fuse(model)
    adapted(model, "all-linear")
    plain = adapted(tiny_llama(), "all-linear")
    assert_same(logits_and_gradients(model), logits_and_gradients(plain), 2e-6)


def test_autocast_computes_in_its_dtype():
    model = tiny_llama().requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(IDS, use_cache=False).logits
        fuse(model)
        assert torch.equal(model(IDS, use_cache=False).logits, expected)


def test_copies_and_saved_weights_do_not_know_of_it(tmp_path):
    model = tiny_llama().requires_grad_(False)
    names = model.state_dict().keys()
    fuse(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        for layer in twin.model.layers:
            layer.mlp.up_proj.weight.zero_()
        assert torch.equal(model(IDS, use_cache=False).logits, expected)
        assert not torch.equal(twin(IDS, use_cache=False).logits, expected)
        model.save_pretrained(tmp_path)
        again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert_same([again(IDS, use_cache=False).logits], [expected], 1e-6)
    assert model.state_dict().keys() == names


def test_unfused_runs_the_modules_as_they_were():
    model = tiny_llama().bfloat16().requires_grad_(False)
    expected = model(IDS, use_cache=False).logits
    assert fuse(model)
    for one in (model, copy.deepcopy(model)):
        assert not torch.equal(one(IDS, use_cache=False).logits, expected)
        with unfused(one):
            assert torch.equal(one(IDS, use_cache=False).logits, expected)
        assert not torch.equal(one(IDS, use_cache=False).logits, expected)


def test_generation_is_the_same():
    model = tiny_llama().requires_grad_(False)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    expected = model.generate(IDS, **options)
    fuse(model)
    assert torch.equal(model.generate(IDS, **options), expected)


def test_a_model_of_other_parts_keeps_its_forwards():
    model = tiny_gpt2().requires_grad_(False)
    assert set(fuse(model)) <= {"lm_head"}


def test_it_draws_no_random_number():
    model = tiny_llama().requires_grad_(False)
    state = torch.get_rng_state()
    assert fuse(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rows", [1, 31, 32, 200])
@pytest.mark.usefixtures("kernels")
def test_products_are_those_of_fp32(rows):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, 70, generator=g), torch.randn(90, 70, generator=g)
    exact = (x.double() @ weight.double().T).float()
    assert (products.product(x, weight) - exact).abs().max() <= 3e-6 * exact.abs().max()
    above = torch.randn(rows, 90, generator=g)
    exact = (above.double() @ weight.double()).float()
    assert (products.product(above, weight.T) - exact).abs().max() <= 3e-6 * exact.abs().max()


def test_the_option_is_on_by_default_and_can_be_switched_off():
    base = ["model.path=x", "adapter=lora", "objective=sft", "optimiser=adamw", "data=jsonl", "data.path=y"]
    assert compose("train", base).model.fused is True
    assert compose("train", [*base, "model.fused=false"]).model.fused is False
