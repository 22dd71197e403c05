"""NF4: the code book and the values, which layers, what storage takes, layers that stay as loaded."""

import subprocess
import sys
from pathlib import Path

import bitsandbytes
import pytest
import torch
from bitsandbytes import cextension
from bitsandbytes.functional import dequantize_blockwise, get_4bit_type
from torch import nn
from transformers import AutoModelForCausalLM

from helpers import tiny_gpt2, tiny_llama, tiny_tokenizer
from luthier import ConfigError, ModelError, compose, train
from luthier.adapters.linear_adapter import weight_in_use
from luthier.commands.train import _Training
from luthier.config.model_config import ModelConfig
from luthier.models.model import load_model
from luthier.runs.run_header import parameter_counts
from luthier.system.processes import Processes
from luthier_plugins.quantisers.nf4 import NF4
from luthier_toolkits.bitsandbytes import quantiser as bnb

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
    return load_model(config, train_base=False, quantiser=NF4(**options))


def dense(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def code_book():
    """The paper's appendix E: 8 quantiles above zero, 7 below, and zero itself, scaled to [−1, 1]."""
    offset = 0.9677083
    above = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([above, below, torch.zeros(1, dtype=torch.float64)]).sort().values
    return values / values.max()


def rounded(weight, block):
    """Every weight as the nearest value of the code book times its block's largest absolute value."""
    blocks = weight.reshape(-1, block)
    largest = blocks.abs().amax(1, keepdim=True)
    code = code_book().float()
    nearest = (blocks / largest)[..., None].sub(code).abs().argmin(-1)
    return (code[nearest] * largest).view(weight.shape), largest.flatten()


def test_the_code_book_is_the_papers():
    found = get_4bit_type("nf4", device="cpu").double()
    assert len(found) == 16
    assert torch.allclose(found.sort().values, code_book(), atol=1e-4)


@pytest.mark.parametrize("block", [32, 64, 128])
def test_a_layer_computes_with_the_nearest_values(base, block):
    layer = loaded(base, double_quant=False, block_size=block).model.get_submodule(LAYER)
    expected, largest = rounded(dense(base).get_submodule(LAYER).weight.detach(), block)
    assert torch.equal(layer.weight.quant_state.absmax, largest)
    assert torch.allclose(weight_in_use(layer), expected, atol=1e-4 * largest.max())
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(layer(x), x @ expected.T, atol=2e-3)


def test_double_quantisation_rounds_the_scales_alone(base):
    layer = loaded(base).model.get_submodule(LAYER)
    weight = dense(base).get_submodule(LAYER).weight.detach()
    _, largest = rounded(weight, 64)
    state = layer.weight.quant_state
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert 0 < (scales - largest).abs().max() < 0.02 * largest.max()
    plain = loaded(base, double_quant=False).model.get_submodule(LAYER)
    assert torch.equal(layer.weight.data, plain.weight.data)
    expected = weight_in_use(plain).view(-1, 64) / largest[:, None] * scales[:, None]
    assert torch.allclose(weight_in_use(layer).view(-1, 64), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "bits"),
    [({}, 4.127), ({"double_quant": False}, 4.5), ({"block_size": 128}, 4.0635), ({"block_size": 32}, 4.254)],
)
def test_storage_takes_the_bits_it_says(base, options, bits):
    assert NF4(**options).bits_per_weight() == pytest.approx(bits, abs=1e-3)
    layer = loaded(base, **options).model.get_submodule(LAYER)
    state = layer.weight.quant_state
    kept = [layer.weight.data, state.absmax, *([state.state2.absmax] if state.nested else [])]
    stored = 8 * sum(one.numel() * one.element_size() for one in kept)
    # A last block that is not full has a scale too.
    assert stored / (128 * 256) == pytest.approx(NF4(**options).bits_per_weight(), abs=2e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_not_quantised_has_the_models_dtype(base, dtype):
    model = loaded(base, dtype).model
    wanted = getattr(torch, dtype)
    assert model.dtype == wanted
    kinds = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            kinds.setdefault(type(module), []).append(name)
    assert kinds[nn.Linear] == ["lm_head"]
    assert len(kinds[bitsandbytes.nn.Linear4bit]) == 14
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.uint8 if "proj" in name else wanted), name
    assert model.get_submodule(LAYER).compute_dtype == wanted
    assert (
        loaded(base, dtype, compute_dtype="float32").model.get_submodule(LAYER).compute_dtype == torch.float32
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("skip", "stay"),
    [
        ([], set()),
        (["down_proj"], {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}),
        ([r"layers\.1\.mlp\..*"], {f"model.layers.1.mlp.{one}_proj" for one in ("gate", "up", "down")}),
        (["o_proj", "layers.0.self_attn.q_proj"],
         {f"model.layers.{one}_proj" for one in ("0.self_attn.o", "1.self_attn.o", "0.self_attn.q")}),
    ],
)  # fmt: skip
def test_the_head_and_what_is_skipped_stay(tmp_path, tied, skip, stay):
    size = {"vocab_size": len(tiny_tokenizer()), "tie_word_embeddings": tied, **SHAPE}
    model = loaded(saved(tmp_path, tiny_llama(**size)), skip=skip).model
    plain = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert plain == stay | {"lm_head"}
    assert tied == (model.lm_head.weight is model.model.embed_tokens.weight)
    quantiser = NF4(skip=skip)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert {name for name in linears if not quantiser.quantises(name)} == stay


def test_layers_that_store_their_weight_transposed_are_quantised_with_their_bias(tmp_path):
    model = tiny_gpt2(vocab_size=len(tiny_tokenizer()), n_embd=64)
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.bias.normal_()
    layer = loaded(saved(tmp_path, model), double_quant=False).model.transformer.h[0].attn.c_attn
    own = model.transformer.h[0].attn.c_attn
    expected, _ = rounded(own.weight.T.contiguous().detach(), 64)
    assert torch.allclose(weight_in_use(layer), expected, atol=1e-5)
    assert torch.equal(layer.bias, own.bias)


def input_gradient(model):
    embedded = model.model.embed_tokens(IDS).detach().requires_grad_()
    model(inputs_embeds=embedded, use_cache=False).logits.float().square().mean().backward()
    return embedded.grad


@pytest.mark.parametrize("stored", [False, True], ids=["quantised_here", "quantised_before"])
def test_an_evaluation_changes_neither_weights_nor_gradients(base, tmp_path, stored):
    # bitsandbytes packs a layer anew at its first forward in eval mode, for good, and without a gradient.
    if stored:
        saved(tmp_path, loaded(base, "bfloat16").model)
        config = ModelConfig(path=str(tmp_path), dtype="bfloat16", device="cpu")
        model = load_model(config, train_base=False).model.requires_grad_(False)
    else:
        model = loaded(base, "bfloat16").model.requires_grad_(False)
    before = input_gradient(model.train())
    weights = {name: one.clone() for name, one in model.state_dict().items()}
    with torch.no_grad():
        model.eval()(IDS)
    assert torch.equal(input_gradient(model.train()), before)
    assert torch.equal(input_gradient(model.eval()), before)
    assert before.abs().sum() > 0
    after = model.state_dict()
    assert weights.keys() == after.keys()
    assert all(torch.equal(one, after[name]) for name, one in weights.items())
    layers = [one for one in model.modules() if isinstance(one, bitsandbytes.nn.Linear4bit)]
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_counts_are_of_weights_and_not_of_bytes(base):
    assert parameter_counts(loaded(base).model)[1] == parameter_counts(dense(base))[1]


def test_a_saved_model_is_one_of_transformers(base, tmp_path):
    model = loaded(base, block_size=32).model
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert back.config.quantization_config.quant_method == "bitsandbytes"
    layer = back.get_submodule(LAYER)
    assert layer.weight.quant_state.blocksize == 32
    assert torch.equal(weight_in_use(layer), weight_in_use(model.get_submodule(LAYER)))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"block_size": 48}, "block_size=48: bitsandbytes has blocks of 32, 64"),
        ({"skip": ["down_prj"]}, "skip=down_prj fits no linear layer: did you mean 'down_proj'"),
        ({"skip": ["lm_head"]}, "the output head is never quantised"),
        ({"skip": ["("]}, "is no regular expression"),
    ],
)
def test_options_that_cannot_be_meant_are_one_line(base, options, told):
    with pytest.raises(ConfigError, match=told) as caught:
        loaded(base, **options)
    assert "\n" not in str(caught.value)


def test_rows_that_this_machine_would_misread_are_refused_or_right(tmp_path):
    # On CPUs with AVX-512, bitsandbytes reads blocks that go over the end of a row with another's scale.
    size = {"vocab_size": len(tiny_tokenizer()), "hidden_size": 96, "intermediate_size": 160}
    base = saved(tmp_path, tiny_llama(**size))
    told = r"misreads model\.layers\.0\.\S+ on cpu: its rows of 96 .* of 64; choose quantiser\.block_size=32"
    if bnb._misreads(96, 64, torch.float32, torch.device("cpu")):
        with pytest.raises(ConfigError, match=told):
            loaded(base)
    else:
        layer = loaded(base, double_quant=False).model.get_submodule(LAYER)
        expected, _ = rounded(dense(base).get_submodule(LAYER).weight.detach(), 64)
        assert torch.allclose(weight_in_use(layer), expected, atol=1e-4)
    layer = loaded(base, double_quant=False, block_size=32).model.get_submodule(LAYER)
    expected, _ = rounded(dense(base).get_submodule(LAYER).weight.detach(), 32)
    assert torch.allclose(weight_in_use(layer), expected, atol=1e-4)


@pytest.mark.parametrize("size", [32, 64, 128, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_scale_of_another_block_is_a_misreading(monkeypatch, size, dtype):
    bnb._misreads.cache_clear()
    functional = bitsandbytes.functional
    assert not bnb._misreads(2 * size, size, dtype, torch.device("cpu"))
    plain = functional.dequantize_4bit

    def shifted(packed, state):
        state.absmax = state.absmax.roll(1)
        return plain(packed, state)

    monkeypatch.setattr(functional, "dequantize_4bit", shifted)
    assert bnb._misreads(3 * size, size, dtype, torch.device("cpu"))
    bnb._misreads.cache_clear()


@pytest.mark.parametrize(
    ("cuda", "said", "told"),
    [
        (False, "XPU/CPU can run without native library.", r"lacks libbitsandbytes_cpu\S+, .*pip install -U"),
        (True, "No compatible CUDA binary found at /x/libbitsandbytes_cuda117.so",
         r"lacks libbitsandbytes_cuda117\.so, its kernels for CUDA \S+ \(.* 11\.8, .*\): pip install"),
        (True, "libcudart.so.12: cannot open shared object file", r"cannot load its kernels .*: libcudart"),
    ],
)  # fmt: skip
def test_a_bitsandbytes_without_kernels_says_which_and_how_to_get_it(monkeypatch, cuda, said, told):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    broken = object.__new__(cextension.ErrorHandlerMockBNBNativeLibrary)
    vars(broken)["error_msg"] = said
    monkeypatch.setattr(cextension, "lib", broken)
    with pytest.raises(ConfigError, match=told):
        NF4().load_options(tiny_llama().config, torch.float32)


def test_a_missing_bitsandbytes_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"bitsandbytes cannot be used .*: pip install -U bitsandbytes"):
        NF4().load_options(tiny_llama().config, torch.float32)


def test_a_checkpoint_that_is_quantised_is_neither_quantised_again_nor_trained(base, tmp_path):
    saved(tmp_path, loaded(base).model)
    with pytest.raises(ModelError, match=r"quantised already \(bitsandbytes\): leave out quantiser"):
        loaded(tmp_path)
    config = ModelConfig(path=str(tmp_path), dtype="float32", device="cpu")
    with pytest.raises(ModelError, match=r"is quantised \(bitsandbytes\), .*: choose adapter=lora"):
        load_model(config, train_base=True)
    kept = load_model(config, train_base=False)
    assert kept.quantised
    assert isinstance(kept.model.get_submodule(LAYER), bitsandbytes.nn.Linear4bit)


def test_what_trains_all_weights_or_shards_them_is_refused(base, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    arguments = [f"model.path={base}", "data=jsonl", f"data.path={rows}", f"run_dir={tmp_path}/run",
                 "quantiser=nf4", "model.device=cpu", "tracker=[]"]  # fmt: skip
    with pytest.raises(ConfigError, match="adapter=full cannot be combined with quantiser=nf4: adapter=lora"):
        train(compose("train", [*arguments, "adapter=full"]))
    with pytest.raises(ConfigError, match="cannot be sharded: launch without --use_fsdp"):
        _Training.prepare(compose("train", arguments), tmp_path, Processes(0, 2, sharded=True))


PEAK = """
import gc, pathlib, re, sys, threading, time
from luthier_toolkits.bitsandbytes.quantiser import require
from luthier.config import build_method
from luthier.models.model import ModelConfig, load_model

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024

def watch():
    while True:
        seen.append(anonymous())
        time.sleep(0.001)

def load(path):
    config = ModelConfig(path=path, dtype="bfloat16", device="cpu")
    return load_model(config, train_base=False, quantiser=build_method("quantiser", {"name": "nf4"}))

load(sys.argv[1])
gc.collect()
before, seen = anonymous(), []
threading.Thread(target=watch, daemon=True).start()
model = load(sys.argv[2]).model
print(max(seen) - before, anonymous() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.slow
def test_the_full_precision_model_is_never_resident(base, tmp_path):
    size = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 16, "num_key_value_heads": 4}
    saved(tmp_path, tiny_llama(vocab_size=len(tiny_tokenizer()), **size))
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(base), str(tmp_path)], capture_output=True, text=True, check=True
    )
    peak, kept = map(int, done.stdout.split())
    bf16 = 2 * 16 * (4 * 512 * 512 + 3 * 512 * 1408)
    assert kept < 0.40 * bf16, f"{kept / bf16:.2f} of bf16"
    assert peak < 0.60 * bf16, f"{peak / bf16:.2f} of bf16"
