"""DoRA: identity at start, its equation, the norm, what it remembers, precision, files, quantised bases."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from helpers import tiny_gpt2, tiny_llama
from luthier import ConfigError, ModelError
from luthier.adapters.linear_adapter import adapted_layers, adapter_off
from luthier.testing.models import FakeQuantised
from luthier_plugins.adapters.dora.dora import DoRA, DoRALinear
from luthier_plugins.adapters.dora.weight_norm import weight_normed_linear

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
    made = DoRALinear(BASES[base]().requires_grad_(False), rank, scale, dropout)
    made.start_kaiming(generator())
    if moved:
        nn.init.normal_(made.lora_B)
        with torch.no_grad():
            made.magnitude.mul_(torch.linspace(0.5, 2, 7))
            if made.base.bias is not None:
                nn.init.normal_(made.base.bias)
    return made


def attached(model=None, seed=0, **options):
    model = model or tiny_llama()
    DoRA(**{"rank": 4, "alpha": 8.0, "dropout": 0.0, **options}).attach(model, generator(seed))
    return model


def dense(made):
    """The weight of the base."""
    weight = made.base.weight.T if isinstance(made.base, Conv1D) else made.base.weight
    return 2 * weight if isinstance(made.base, Doubled) else weight


def plain(made, x, dropped=None):
    """The equation, operation by operation, with W + s·B A built and its norm held constant."""
    norm = (dense(made) + made.scale * made.lora_B @ made.lora_A).norm(dim=1).detach()
    low = (x if dropped is None else dropped) @ made.lora_A.T @ made.lora_B.T
    y = made.magnitude / norm * (x @ dense(made).T + made.scale * low)
    return y if made.base.bias is None else y + made.base.bias


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_it_starts_as_the_base_exactly_and_only_its_own_weights_train(make):
    base, model = make(), attached(make())
    for made in adapted_layers(model).values():
        assert torch.equal(made.magnitude, made.norms())
    torch.testing.assert_close(model(IDS).logits, base(IDS).logits, atol=1e-6, rtol=1e-6)
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "magnitude"}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 5, 12), (600, 12)])
def test_the_function_is_the_equation_and_so_are_its_gradients(base, shape):
    made = layer(base)
    x = torch.randn(shape, generator=generator(), requires_grad=True)
    weights = torch.randn((*shape[:-1], 7), generator=generator(1))
    inputs = (x, made.lora_A, made.lora_B, made.magnitude)
    fused, expected = made(x), plain(made, x)
    torch.testing.assert_close(fused, expected, atol=1e-5, rtol=1e-5)
    before = weights.clone()
    ours = torch.autograd.grad(fused, inputs, weights)
    assert torch.equal(weights, before)  # the gradient above may be somebody else's too
    theirs = torch.autograd.grad(expected, inputs, weights)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5 * float(other.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_gradients_agree_with_finite_differences(base):
    made = layer(base).double()
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    a, b, m = (p.detach().requires_grad_() for p in (made.lora_A, made.lora_B, made.magnitude))
    norms = made.norms()
    assert torch.autograd.gradcheck(
        lambda x, a, b, m: weight_normed_linear(made.base, x, a, b, m, norms, 0.7), (x, a, b, m)
    )


@pytest.mark.parametrize("base", BASES)
def test_the_norm_is_that_of_the_built_weight(base):
    made = layer(base)
    expected = (dense(made).double() + 0.7 * made.lora_B.double() @ made.lora_A.double()).norm(dim=1)
    torch.testing.assert_close(made.norms().double(), expected, atol=0, rtol=1e-6)
    merged = (made.magnitude.double() / expected)[:, None]
    merged = merged * (dense(made).double() + 0.7 * made.lora_B.double() @ made.lora_A.double())
    torch.testing.assert_close(made.merged_weight().double(), merged, atol=1e-6, rtol=1e-5)


class Sizes(TorchDispatchMode):
    """Notes the size of everything that operations allocate: not views, not a weight's own storage."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        own = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in own:
            self.seen.append(out.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "quantised"])
def test_neither_norm_nor_start_builds_anything_as_large_as_the_weight(kind, dtype, monkeypatch):
    monkeypatch.setattr("luthier_plugins.adapters.dora.row_norms.BLOCK", 1 << 10)
    d_in, d_out = 128, 250
    base = {
        "linear": lambda: nn.Linear(d_in, d_out),
        "conv1d": lambda: Conv1D(d_out, d_in),
        "quantised": lambda: FakeQuantised(nn.Linear(d_in, d_out)),
    }[kind]()
    base = base.requires_grad_(False) if kind == "quantised" else base.requires_grad_(False).to(dtype)
    own = [d_in * d_out] if kind == "quantised" else []  # unpacked by its own forward
    with Sizes() as start:
        made = DoRALinear(base, 4, 0.5, 0.0)
    with Sizes() as norm:
        made.norms()
    assert norm.seen
    for sizes in (start.seen, norm.seen):
        assert max([size for size in sizes if size not in own], default=0) < d_in * d_out // 2


@pytest.mark.parametrize("base", ["linear", "no bias"])
def test_it_remembers_its_input_the_projection_and_its_output(base):
    made = layer(base)
    x = torch.randn(2, 5, 12, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = made(x)
    activations = sorted(tuple(t.shape) for t in kept if t.dim() == 2 and t.shape[0] == 10)
    assert activations == [(10, 3), (10, 7), (10, 12)]
    output = next(t for t in kept if t.shape == (10, 7))
    # Without a bias it is the output itself, which what comes next often keeps anyway.
    assert (output.data_ptr() == y.data_ptr()) == (base == "no bias")


def near(made, row, part):
    """Make the update of one row all but cancel it: what stays is `part` of the weight."""
    with torch.no_grad():
        made.lora_A[0] = made.base.weight[row]
        made.lora_B[row] = 0
        made.lora_B[row, 0] = -(1 - part) / made.scale
    return made


@pytest.mark.parametrize("part", [0.0, 1e-6, 1e-3])
def test_rows_that_cancel_stay_finite(part):
    made = near(layer("no bias"), 2, part)
    norm, length = made.norms(), made.base.weight[2].norm()
    assert 0.9e-3 * length < norm[2] < 3e-3 * length
    x = torch.randn(5, 12, requires_grad=True)
    made(x).square().sum().backward()
    for gradient in (x.grad, made.lora_A.grad, made.lora_B.grad, made.magnitude.grad):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_nearly_cancel_are_still_right(dtype):
    # The cross term is as large as ‖w‖²: in 16 bits it would be wrong by more than what is left.
    torch.manual_seed(0)
    base = nn.Linear(12, 7, bias=False).requires_grad_(False).to(dtype)
    made = near(DoRALinear(base, 3, 0.7, 0.0), 2, 0.05)
    exact = (made.base.weight.double() + 0.7 * made.lora_B.double() @ made.lora_A.double()).norm(dim=1)
    torch.testing.assert_close(made.norms().double(), exact, atol=0, rtol=1e-3)


def test_a_row_of_zeros_starts_as_the_base_and_learns():
    base = nn.Linear(12, 7, bias=False).requires_grad_(False)
    base.weight[3] = 0
    made = DoRALinear(base, 3, 0.7, 0.0)
    made.start_kaiming(generator())
    x = torch.randn(50, 12)
    assert torch.equal(made(x)[:, 3], torch.zeros(50))
    assert made.magnitude[3] > 0
    target, losses = torch.randn(50, 7), []
    optimiser = torch.optim.Adam(made.parameters(), lr=0.05)
    for _ in range(30):
        optimiser.zero_grad()
        loss = (made(x)[:, 3] - target[:, 3]).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.isfinite(p).all() for p in made.parameters())


def test_a_magnitude_of_zero_gives_zero_and_no_nan():
    made = layer("no bias")
    with torch.no_grad():
        made.magnitude[4] = 0
    y = made(torch.randn(5, 12))
    y.sum().backward()
    assert torch.equal(y[:, 4], torch.zeros(5))
    assert all(torch.isfinite(p.grad).all() for p in made.parameters() if p.requires_grad)


@pytest.mark.parametrize("base", BASES)
def test_dropout_drops_the_inputs_of_the_update_in_training_only(base):
    made = layer(base, dropout=0.5)
    x = torch.randn(3, 12, requires_grad=True)
    inputs = (x, made.lora_A, made.lora_B, made.magnitude)
    made.train()
    torch.manual_seed(7)
    trained = made(x)
    torch.manual_seed(7)
    expected = plain(made, x, nn.functional.dropout(x, 0.5))
    torch.testing.assert_close(trained, expected, atol=1e-5, rtol=1e-5)
    ours, theirs = (torch.autograd.grad(y.square().sum(), inputs) for y in (trained, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5 * float(other.abs().max()), rtol=1e-5)
    torch.testing.assert_close(made.eval()(x), plain(made, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("base", ["linear", "conv1d"])
def test_autocast_computes_in_bf16_and_keeps_fp32_gradients(base):
    made = layer(base)
    x = torch.randn(300, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), plain(made, x), atol=0.1, rtol=0.05)
    inputs = (x, made.lora_A, made.lora_B, made.magnitude)
    ours = torch.autograd.grad(y.float().square().sum(), inputs)
    theirs = torch.autograd.grad(plain(made, x).square().sum(), inputs)
    for mine, exact in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - exact).norm() < 0.03 * exact.norm()


def test_a_scale_between_two_numbers_of_bf16_is_not_rounded():
    made = layer("no bias", moved=False)
    made.base.to(torch.bfloat16)
    x = torch.randn(4000, 12, generator=generator()).to(torch.bfloat16)
    with torch.no_grad():
        before = made(x).float().abs().sum()
        made.magnitude.mul_(1 + 3 * 2**-9)  # bf16 has 1 and 1 + 4 · 2⁻⁹
        after = made(x).float().abs().sum()
    assert float(after / before) == pytest.approx(1 + 3 * 2**-9, abs=5e-4)


def four_bit(model, dtype):
    """Every linear layer of `model` but the head in NF4."""
    bnb = pytest.importorskip("bitsandbytes")
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not model.get_output_embeddings():
            packed = bnb.nn.Linear4bit(
                module.in_features, module.out_features, False, dtype, quant_type="nf4"
            )
            packed.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            packed.support_avx512bf16_for_cpu = False
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, packed.to("cpu"))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_over_nf4_every_magnitude_moves_in_fp32(dtype):
    bnb = pytest.importorskip("bitsandbytes")
    shape = {"hidden_size": 64, "intermediate_size": 128}
    model = attached(four_bit(tiny_llama(**shape).to(dtype), dtype)).train()
    layers = adapted_layers(model)
    with adapter_off(model):
        off = model(IDS).logits
    assert torch.equal(model(IDS).logits, off)
    for made in layers.values():
        weight = bnb.functional.dequantize_4bit(made.base.weight.data, made.base.weight.quant_state)
        torch.testing.assert_close(made.squared, weight.float().square().sum(1), atol=0, rtol=1e-4)
    start = {name: made.magnitude.detach().clone() for name, made in layers.items()}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for name, made in layers.items():
        assert made.magnitude.dtype == torch.float32
        moved = made.magnitude != start[name]
        assert moved.float().mean() > 0.9, name


def test_a_large_bias_costs_the_norm_nothing():
    base = FakeQuantised(nn.Linear(12, 7)).requires_grad_(False)
    base.bias = nn.Parameter(torch.full((7,), 1e6), requires_grad=False)
    made = DoRALinear(base, 3, 0.7, 0.0)
    weight = base(torch.eye(12)) - base.bias  # rounded away, as it would be inside
    exact = base.weight.view(7, 12).float() * base.scale
    assert (weight.T - exact).abs().max() > 1e-3
    torch.testing.assert_close(made.norms(), exact.norm(dim=1), atol=0, rtol=1e-6)
    assert float(made.base.bias[0]) == 1e6


def test_norms_are_remembered_only_while_nothing_trains():
    made = layer("no bias")
    x = torch.randn(5, 12)
    with torch.no_grad():
        made.eval()(x)
        assert made.norms() is made.norms()
        made.lora_B.add_(1.0)
        torch.testing.assert_close(made(x), plain(made, x))
        remembered = made.norms()
    made.train()
    assert made.norms() is not remembered
    assert made.remembered is None


def test_a_state_that_does_not_fit_is_refused():
    made = layer()
    state = made.adapter_state()
    with pytest.raises(ModelError, match=r"expected lora_A.weight, lora_B.weight, lora_magnitude_vector"):
        made.load_adapter_state({key: state[key] for key in ("lora_A.weight", "lora_B.weight")})
    with pytest.raises(ModelError, match=r"lora_magnitude_vector is \[6\], expected \[7\]"):
        made.load_adapter_state({**state, "lora_magnitude_vector": torch.ones(6)})


def test_options_that_cannot_train_are_refused():
    with pytest.raises(ConfigError, match=r"alpha=0\.0"):
        DoRA(alpha=0.0)
    with pytest.raises(ConfigError, match=r"rank=17 is too much for model.layers.0.self_attn.k_proj"):
        attached(rank=17, targets=["q_proj", "k_proj"])


def test_on_the_meta_device_only_shapes_are_made():
    with torch.device("meta"):
        model = tiny_llama()
    made = adapted_layers(attached(model))["model.layers.0.self_attn.q_proj"]
    assert made.magnitude.is_meta
    assert made.magnitude.shape == (32,)


@pytest.mark.parametrize("base", ["no bias", "linear"])
def test_an_output_that_is_added_to_in_place_is_no_traceback(base):
    """C: as Falcon's parallel attention does to the output of its MLP; with a bias the output is not kept."""
    made, x = layer(base), torch.randn(4, 12)
    changed = made(x)
    changed += 1
    if base == "linear":
        changed.sum().backward()
        return
    with pytest.raises(ModelError, match="adds in place to the output of a layer, which DoRA keeps"):
        changed.sum().backward()
