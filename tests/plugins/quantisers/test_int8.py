"""int8: the values, one function in training and out of it, its gradient, and what it does not remember."""

import copy

import bitsandbytes
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from helpers import tiny_gpt2, tiny_llama, tiny_tokenizer
from luthier import ConfigError, ModelError, ModelPolicy
from luthier.adapters.linear_adapter import weight_in_use
from luthier.config.model_config import ModelConfig
from luthier.models.model import load_model
from luthier.runs.run_header import parameter_counts
from luthier_plugins.quantisers.int8 import Int8

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}
IDS = torch.arange(20, 60)[None]
LAYER = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("base"), tiny_llama(vocab_size=len(tiny_tokenizer()), **SHAPE))


def saved(path, model):
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def loaded(base, dtype="float32", **options):
    config = ModelConfig(path=str(base), dtype=dtype, device="cpu")
    return load_model(config, train_base=False, quantiser=Int8(**options)).model


def dense(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def rounded(weight):
    """Every weight as a multiple of a 127th of its row's largest absolute value."""
    largest = weight.abs().amax(1, keepdim=True)
    return (weight / largest * 127).round() * largest / 127


def test_a_layer_computes_with_the_nearest_multiples(base):
    layer = loaded(base).get_submodule(LAYER)
    weight = (
        dense(base).get_submodule(LAYER).weight.detach().half().float()
    )  # bitsandbytes reads them in fp16
    # In fp16 a multiple may be off by one where two are equally near.
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((weight_in_use(layer) - rounded(weight)).abs() <= 1.01 * step).all()
    assert (weight_in_use(layer) - rounded(weight)).abs().mean() < 0.02 * step.mean()
    codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
    assert torch.equal(layer.weight.data, codes)
    assert torch.equal(layer.weight.SCB, scales)
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(layer(x), x @ weight_in_use(layer).T, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_one_function_in_training_and_out_of_it(base, dtype):
    layer = loaded(base, dtype).get_submodule(LAYER)
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    found = [layer.train(mode)(x) for mode in (True, False)]
    assert torch.equal(*found)
    assert found[0].dtype == x.dtype


@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_is_that_of_the_weight_it_computes_with(tmp_path, training):
    model = tiny_gpt2(vocab_size=len(tiny_tokenizer()), n_embd=64)
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.bias.normal_()
    base = saved(tmp_path, model)
    layer = loaded(base).transformer.h[0].attn.c_attn.train(training)
    bias = dense(base).transformer.h[0].attn.c_attn.bias
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = nn.functional.linear(x, weight_in_use(layer), bias)
    towards = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(expected, x, towards)
    found = layer(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(found, x, towards)[0], gradient, atol=1e-5, rtol=1e-5)


def test_nothing_of_its_input_is_kept_for_the_backward_pass(base):
    layer = loaded(base).get_submodule(LAYER)
    kept = []
    x = torch.randn(7, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.shape) or one, lambda one: one):
        layer(x)
    assert kept == [(128, 256), (128,)]


def test_what_is_not_quantised_has_the_models_dtype(base):
    model = loaded(base, "bfloat16")
    assert model.dtype == torch.bfloat16
    assert type(model.lm_head) is nn.Linear
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.int8 if "proj" in name else torch.bfloat16), name
    assert parameter_counts(model)[1] == parameter_counts(dense(base))[1]


def test_storage_takes_the_bits_it_says():
    layer = bitsandbytes.nn.Linear8bitLt(4096, 3, bias=False, has_fp16_weights=False)
    layer.weight = bitsandbytes.nn.Int8Params(torch.randn(3, 4096), requires_grad=False).to("cpu")
    stored = 8 * (layer.weight.numel() + 4 * layer.weight.SCB.numel())
    assert stored / (3 * 4096) == Int8().bits_per_weight()


def test_what_is_skipped_stays(base):
    model = loaded(base, skip=["down_proj", r"0\.self_attn\..*"])
    plain = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    attention = {f"model.layers.0.self_attn.{one}_proj" for one in "qkvo"}
    assert plain == {"lm_head", "model.layers.1.mlp.down_proj", LAYER, *attention}
    assert not Int8(skip=["down_proj"]).quantises(LAYER)


def test_a_copy_and_a_state_dict_hold_all_of_it(base):
    model = loaded(base)
    with torch.no_grad():
        expected = model(IDS).logits
        assert torch.equal(copy.deepcopy(model)(IDS).logits, expected)
        assert torch.equal(model.state_dict()[f"{LAYER}.SCB"], model.get_submodule(LAYER).weight.SCB)


def test_a_threshold_is_the_librarys_own_product(base):
    model = loaded(base, threshold=6.0)
    layer = model.get_submodule(LAYER)
    assert type(layer) is bitsandbytes.nn.Linear8bitLt
    assert layer.state.threshold == 6.0
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        off = (layer.eval()(x) - x @ weight_in_use(layer).T).abs().max()
    assert 1e-4 < off < 0.5


def test_a_row_does_not_depend_on_the_rows_beside_it_unless_inputs_are_quantised(base):
    ModelPolicy(loaded(base)).check()
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(0))

    def off(**options):
        layer = loaded(base, **options).get_submodule(LAYER).eval()
        with torch.no_grad():
            return (layer(x)[:2] - layer(x[:2])).abs().max()

    assert off() < 1e-5
    assert off(threshold=2.5) > 1e-3


def test_a_checkpoint_in_8_bits_is_not_quantised_again(base, tmp_path):
    saved(tmp_path, loaded(base))
    with pytest.raises(ModelError, match=r"quantised already \(bitsandbytes\): leave out quantiser"):
        loaded(tmp_path)


@pytest.mark.parametrize("threshold", [-1.0, float("nan"), float("inf")])
def test_a_threshold_that_cannot_be_meant_is_refused(threshold):
    with pytest.raises(ConfigError, match=r"threshold=.* must not be negative"):
        Int8(threshold=threshold)
