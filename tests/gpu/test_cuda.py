"""Token trees, methods and whole runs on a CUDA device, beside the same on the CPU."""

import itertools
from functools import partial

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from helpers import crash, plain_values, save_tiny, tiny_llama, write_rows
from luthier import Branch, Codec, ModelPolicy, Pack, Tree, compose, train
from luthier.kernels import fuse
from luthier.policy import Decoding, answers
from luthier.runs.state import _random, _set_random
from luthier.system import Watch, peak_memory_mb, settle
from luthier.testing.models import tiny_tokenizer

TREES = [Tree((1, 2, 3), (Branch((4, 5, 6)), Branch((7, 8)), Branch((9,)))), Tree((9, 10), (Branch((11,)),))]
SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 97, "initializer_range": 0.15, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": partial(tf.LlamaConfig, **SHAPE),
    "qwen3": partial(tf.Qwen3Config, **SHAPE),
    "gemma2": partial(tf.Gemma2Config, **SHAPE, sliding_window=3),
    "gemma3": partial(tf.Gemma3TextConfig, **SHAPE, sliding_window=3),
}


def built(name):
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(FAMILIES[name]()).eval()


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-3), (torch.bfloat16, 0.3)])
@pytest.mark.parametrize("name", FAMILIES)
def test_token_trees_have_the_values_of_plain_forwards_on_the_cpu(cuda, name, dtype, off):
    expected = plain_values(built(name), TREES)
    policy = ModelPolicy(built(name).to(cuda, dtype))
    policy.check()
    assert policy.path == "tree"
    values = policy.logprobs(Pack.of(TREES, cuda)).values.cpu()
    assert torch.allclose(values, expected, atol=off)


@pytest.mark.parametrize("name", FAMILIES)
def test_fused_functions_have_the_gradients_of_plain_ones(cuda, name):
    found = []
    for fused in (False, True):
        model = built(name).to(cuda)
        model.requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_()
        if fused:
            fuse(model)
        ModelPolicy(model).logprobs(Pack.of(TREES, cuda)).values.sum().backward()
        found.append(model.get_input_embeddings().weight.grad)
    assert (found[1] - found[0]).abs().max() <= 1e-3 * found[0].abs().max()


def prepared(tmp_path, monkeypatch, objective):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base", hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    rows = [
        {"prompt": f"{a} ->", "completion": f" {b}", "chosen": f" {b}", "rejected": f" {a}"}
        for a, b in itertools.pairwise("abcdefghij")
    ]
    wanted = ("prompt", "completion") if objective == "sft" else ("prompt", "chosen", "rejected")
    write_rows(tmp_path / "rows.jsonl", [{key: row[key] for key in wanted} for row in rows])
    options = ["model.path=base", "model.dtype=float32", "data=jsonl", "data.path=rows.jsonl", "max_steps=4"]
    return [*options, f"objective={objective}", "optimiser.lr=1e-3", "batch_size=4", "tracker=[]"]


@pytest.mark.parametrize("adapter", ["full", "lora", "dora"])
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_a_run_on_the_device_learns_what_one_on_the_cpu_learns(
    cuda, tmp_path, monkeypatch, adapter, objective
):
    options = [*prepared(tmp_path, monkeypatch, objective), f"adapter={adapter}"]
    # Dropout masks differ from device to device.
    options += [] if adapter == "full" else ["adapter.dropout=0"]
    places = {"cpu": "cpu", "device": cuda.type}
    losses = {
        name: train(compose("train", [*options, f"model.device={place}", f"run_dir={name}"])).last_loss
        for name, place in places.items()
    }
    assert losses["device"] == pytest.approx(losses["cpu"], rel=1e-3)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_run_that_crashed_goes_on_bit_by_bit(cuda, tmp_path, monkeypatch, adapter):
    options = [
        *prepared(tmp_path, monkeypatch, "dpo"), f"adapter={adapter}", f"model.device={cuda.type}",
        "model.deterministic=true", "checkpoint.every=2", "log_every=1",
    ]  # fmt: skip
    try:
        train(compose("train", [*options, "run_dir=whole"]))
        crash([*options, "run_dir=broken"], 3)
        train(compose("train", ["resume=broken"]))
    finally:
        torch.use_deterministic_algorithms(False)
    files = [next((tmp_path / run / "model").glob("*model.safetensors")) for run in ("whole", "broken")]
    whole, broken = map(load_file, files)
    assert all(torch.equal(tensor, broken[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("quantiser", ["nf4", "int8"])
def test_a_quantised_base_learns(cuda, tmp_path, monkeypatch, quantiser):
    pytest.importorskip("bitsandbytes")
    options = [*prepared(tmp_path, monkeypatch, "sft"), f"quantiser={quantiser}", f"model.device={cuda.type}"]
    result = train(compose("train", [*options, "run_dir=run", "optimiser.lr=1e-2", "max_steps=12"]))
    assert result.last_loss < result.first_loss


@pytest.mark.parametrize("optimiser", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit", "galore"])
def test_an_optimiser_learns(cuda, tmp_path, monkeypatch, optimiser):
    if optimiser != "galore":
        pytest.importorskip("bitsandbytes")
    if optimiser.startswith("paged") and cuda.type != "cuda":
        pytest.skip("pages nothing without CUDA")
    options = [*prepared(tmp_path, monkeypatch, "sft"), f"optimiser={optimiser}", "adapter=full"]
    options += ["optimiser.rank=8"] if optimiser == "galore" else []
    given = [f"model.device={cuda.type}", "run_dir=run", "max_steps=12"]
    result = train(compose("train", [*options, *given]))
    assert result.last_loss < result.first_loss


def test_greedy_answers_are_those_of_the_cpu(cuda):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    prompts, decoding = [[5, 6, 7], [8, 9]], Decoding(max_new_tokens=8, batch_size=2)
    found = []
    for device in (torch.device("cpu"), cuda):
        policy = ModelPolicy(tiny_llama(vocab_size=len(tokenizer)).eval().to(device))
        given = answers(policy, Codec(tokenizer), prompts, decoding)
        found.append({place: [answer.ids for answer in those] for place, those in given})
    assert found[0] == found[1]


def test_thin_products_of_16_bits_are_summed_in_32(cuda):
    settle(deterministic=False)
    a, b = (torch.randn(8192, n, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (16, 64))
    exact = a.double().T @ b.double()
    found = (a.to(cuda).T @ b.to(cuda)).double().cpu()
    assert (found - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_random_states_are_those_of_the_device(cuda):
    state = _random(cuda)
    first = torch.rand(5, device=cuda)
    _set_random(state, cuda)
    assert torch.equal(torch.rand(5, device=cuda), first)


def test_memory_is_metered_on_the_device(cuda):
    watch = Watch(cuda)
    large = torch.ones(25 * 2**20, device=cuda)
    watch.look(1)
    del large
    assert watch.highest_mb >= 100
    assert peak_memory_mb(cuda) >= 100
