"""LoRA: identity at start, its equation, what it remembers, where the backward pass ends, its options."""

import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from helpers import tiny_gpt2, tiny_llama
from luthier import ConfigError, ModelError
from luthier.adapters.linear_adapter import adapted_layers, adapter_off, fold
from luthier.kernels import fused
from luthier_plugins.adapters.lora import LoRA, LoRALinear
from luthier_toolkits.low_rank.low_rank import low_rank_linear, principal_part

IDS = torch.arange(3, 27).view(2, 12)


class Doubled(nn.Linear):
    """A linear layer of a stranger's kind, as quantised ones are: its weight is not what it computes with."""

    def forward(self, x):
        return nn.functional.linear(x, 2 * self.weight, self.bias)


BASES = {
    "linear": lambda: nn.Linear(12, 7),
    "no bias": lambda: nn.Linear(12, 7, bias=False),
    "conv1d": lambda: Conv1D(7, 12),
    "quantised": lambda: Doubled(12, 7),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def layer(base="linear", rank=3, scale=0.7, dropout=0.0, moved=True):
    torch.manual_seed(0)
    made = LoRALinear(BASES[base]().requires_grad_(False), rank, scale, dropout)
    made.start_kaiming(generator())
    if moved:
        nn.init.normal_(made.lora_B)
    return made


def attached(model=None, seed=0, **options):
    model = model or tiny_llama()
    LoRA(**{"rank": 4, "alpha": 8.0, "dropout": 0.0, **options}).attach(model, generator(seed))
    return model


def plain(made, x):
    """The equation, operation by operation."""
    return made.base(x) + made.scale * nn.functional.linear(nn.functional.linear(x, made.lora_A), made.lora_B)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_it_starts_as_the_base_and_only_its_own_weights_train(make, init):
    base, model = make(), attached(make(), init=init)
    torch.testing.assert_close(model(IDS).logits, base(IDS).logits, atol=1e-5, rtol=1e-5)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.rpartition(".")[2] in ("lora_A", "lora_B") for name in trained)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_kaiming_is_the_papers_and_the_seed_decides():
    first, again, other = (attached(seed=seed) for seed in (0, 0, 1))
    a = next(iter(adapted_layers(first).values())).lora_A
    # Uniform within √(6 / ((1 + a²) d_in)) = 1/√d_in for a = √5.
    bound = 1 / math.sqrt(a.shape[1])
    assert 0.9 * bound < a.abs().max() <= bound
    assert torch.equal(a, next(iter(adapted_layers(again).values())).lora_A)
    assert not torch.equal(a, next(iter(adapted_layers(other).values())).lora_A)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 5, 12)])
def test_the_function_is_the_equation_and_so_are_its_gradients(base, shape):
    made = layer(base)
    x = torch.randn(shape, generator=generator(), requires_grad=True)
    weights = torch.randn((*shape[:-1], 7), generator=generator(1))
    inputs = (x, made.lora_A, made.lora_B)
    fused, expected = made(x), plain(made, x)
    torch.testing.assert_close(fused, expected, atol=1e-6, rtol=1e-6)
    ours = torch.autograd.grad((fused * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("base", ["linear", "conv1d"])
def test_gradients_agree_with_finite_differences(base):
    made = layer(base).double()
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    a, b = made.lora_A.detach().requires_grad_(), made.lora_B.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: low_rank_linear(made.base, *args, 0.7), (x, a, b))


@pytest.mark.parametrize("needs_x", [True, False])
def test_it_remembers_its_input_and_the_projection_only(needs_x):
    made = layer("linear")
    x = torch.randn(2, 5, 12, requires_grad=needs_x)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        made(x)
    pointers = {t.data_ptr() for t in kept}
    own = {t.data_ptr() for t in (x, made.lora_A, made.lora_B, made.base.weight)}
    assert own <= pointers
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in own] == [(10, 3)]


def test_frozen_it_remembers_no_activation():
    made = layer("linear").requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        made(torch.randn(5, 12, requires_grad=True))
    assert {t.data_ptr() for t in kept} == {
        t.data_ptr() for t in (made.lora_A, made.lora_B, made.base.weight)
    }


def test_nothing_below_the_lowest_adapted_layer_enters_the_backward_pass():
    model = attached(targets=r"model\.layers\.1\..*")
    output = model(IDS, labels=IDS, output_hidden_states=True)
    below, above = output.hidden_states[:2], output.hidden_states[2]
    assert all(hidden.grad_fn is None and not hidden.requires_grad for hidden in below)
    assert above.requires_grad
    output.loss.backward()
    lowest = adapted_layers(model)["model.layers.1.self_attn.q_proj"]
    assert lowest.lora_B.grad.abs().max() > 0


@pytest.mark.parametrize("base", ["linear", "conv1d"])
def test_autocast_computes_in_bf16_and_keeps_fp32_gradients(base):
    made = layer(base)
    x = torch.randn(2, 5, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
        expected = plain(made, x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, atol=0.05, rtol=0.05)
    y.float().square().sum().backward()
    gradients = x.grad.clone(), made.lora_A.grad.clone(), made.lora_B.grad.clone()
    assert {g.dtype for g in gradients} == {torch.float32}
    x.grad = made.lora_A.grad = made.lora_B.grad = None
    plain(made, x).square().sum().backward()
    for mine, exact in zip(gradients, (x.grad, made.lora_A.grad, made.lora_B.grad), strict=True):
        assert (mine - exact).norm() < 0.03 * exact.norm()


def test_bf16_bases_compute_in_bf16_with_fp32_updates():
    model = tiny_llama().to(torch.bfloat16)
    attached(model)
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    made = next(iter(adapted_layers(model).values()))
    assert made(torch.randn(2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert made.lora_B.grad.dtype == torch.float32


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_checkpointing_changes_no_gradient(dropout, init):
    def gradients(checkpointed):
        model = attached(dropout=dropout, init=init).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for mine, other in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("base", BASES)
def test_dropout_drops_the_inputs_of_the_update_in_training_only(base):
    made = layer(base, dropout=0.5)
    x = torch.randn(3, 12)
    made.train()
    torch.manual_seed(7)
    trained = made(x)
    torch.manual_seed(7)
    dropped = nn.functional.dropout(x, 0.5)
    expected = made.base(x) + made.scale * dropped @ made.lora_A.T @ made.lora_B.T
    torch.testing.assert_close(trained, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(made.eval()(x), plain(made, x), atol=1e-6, rtol=1e-6)


def test_pissa_takes_the_principal_part():
    u, _, v = torch.linalg.svd(torch.randn(40, 30, generator=generator()), full_matrices=False)
    weight = u * torch.linspace(3, 0, 30).exp() @ v
    b, a = principal_part(weight, 5, generator())
    exact = u[:, :5] * torch.linspace(3, 0, 30).exp()[:5] @ v[:5]
    assert (b @ a - exact).norm() < 1e-3 * exact.norm()
    # Randomness is the generator's alone.
    torch.manual_seed(1234)
    before = torch.random.get_rng_state()
    assert all(map(torch.equal, principal_part(weight, 5, generator()), (b, a)))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("base", BASES)
def test_pissa_leaves_the_base_as_it_is(base):
    torch.manual_seed(0)
    made = LoRALinear(BASES[base]().requires_grad_(False), 3, 0.7, 0.2)
    weight = made.base.weight.clone()
    made.start_pissa(generator())
    x = torch.randn(4, 12)
    torch.testing.assert_close(made.eval()(x), made.base(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(made.base.weight, weight)
    # Under dropout it is the residual, plus the update of what is left of x.
    made.train()
    torch.manual_seed(7)
    trained = made(x)
    torch.manual_seed(7)
    update = (
        nn.functional.dropout(x, 0.2) @ made.lora_A.T @ made.lora_B.T - x @ made.start_A.T @ -made.start_B.T
    )
    torch.testing.assert_close(trained, made.base(x) + 0.7 * update, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_folded_it_is_a_plain_model_of_the_same_function(make, init):
    model = attached(make(), init=init)
    with torch.no_grad():
        for made in adapted_layers(model).values():
            made.lora_B.add_(0.1 * torch.randn(made.lora_B.shape, generator=generator()))
    before = model(IDS).logits
    with adapter_off(model):
        off = model(IDS).logits
    assert torch.equal(off, make()(IDS).logits)
    fold(model)
    assert not adapted_layers(model)
    assert {type(m) for m in model.modules()} == {type(m) for m in make().modules()}
    assert (before - off).abs().max() > 1e-2
    torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=1e-4)


def llama2_7b():
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
            num_attention_heads=32, tie_word_embeddings=False,
        ))  # fmt: skip


@pytest.mark.parametrize(
    ("rank", "targets", "expected"),
    [
        (8, ["q_proj", "v_proj"], 4_194_304),
        (16, ["q_proj", "k_proj", "v_proj", "o_proj"], 16_777_216),
    ],
)
def test_parameter_counts_at_the_shape_of_llama_2_7b(rank, targets, expected):
    model = llama2_7b()
    base = sum(parameter.numel() for parameter in model.parameters())
    attached(model, rank=rank, targets=targets, init="pissa")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == expected == 32 * len(targets) * rank * (4096 + 4096)
    # 6,742,609,920 with the adapter, as LoRA's users see it printed; the base alone is 6,738,415,616.
    assert base + 4_194_304 == 6_742_609_920
    assert adapted_layers(model)["model.layers.0.self_attn.q_proj"].lora_A.is_meta


def test_patterns_set_the_rank_and_alpha_of_single_layers():
    options = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\..*": 3.0}}
    layers = adapted_layers(attached(rank_stabilised=True, **options))
    assert layers["model.layers.0.self_attn.q_proj"].lora_A.shape == (2, 32)
    assert layers["model.layers.0.self_attn.q_proj"].scale == 8 / math.sqrt(2)
    assert layers["model.layers.1.mlp.up_proj"].scale == 3 / math.sqrt(4)
    assert layers["model.layers.0.mlp.up_proj"].scale == 8 / math.sqrt(4)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern="),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
    ],
)
def test_values_that_cannot_train_are_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        LoRA(**options)


def test_a_rank_above_the_weights_is_refused():
    with pytest.raises(
        ConfigError, match=r"rank=17 is too much for model.layers.0.self_attn.k_proj \(32 × 16\)"
    ):
        attached(rank=17, targets=["q_proj", "k_proj"])


def test_a_saved_pissa_adapter_is_not_loaded_into_another():
    made = layer(moved=False)
    made.start_pissa(generator())
    assert made.adapter_state()["lora_A.weight"].shape == (6, 12)
    with pytest.raises(ModelError, match="twice the rank"):
        made.load_adapter_state(made.adapter_state())


@pytest.mark.parametrize("kind", ["lora", "quantised or hooked base", "frozen linear", "gated mlp"])
def test_what_a_layer_gives_may_be_added_to_in_place(kind):
    """C: Falcon's parallel attention adds to the output of its MLP."""
    x = torch.randn(2, 3, 8, requires_grad=True)
    a, b = torch.randn(2, 8, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    base = torch.nn.Linear(8, 6)

    def output():
        if kind == "frozen linear":
            return fused._run_linear(base.requires_grad_(False), x)
        if kind == "gated mlp":
            mlp = tiny_llama().model.layers[0].mlp.requires_grad_(False)
            return fused._run_mlp(mlp, "gate_proj", "up_proj", "down_proj", "act_fn", x.repeat(1, 1, 4))
        return low_rank_linear(base.requires_grad_(kind != "lora"), x, a, b, 0.5)

    (output() * 2 + 1).sum().backward()
    expected = x.grad.clone()
    x.grad = None
    changed = output()
    changed *= 2
    changed += 1
    changed.sum().backward()
    torch.testing.assert_close(x.grad, expected)
