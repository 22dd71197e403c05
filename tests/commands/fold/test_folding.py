"""`fold`: the function stays, what is written is what was measured, on the base that was asked for."""

import json
import logging
import re
import shutil

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import tiny_gpt2, tiny_llama, tiny_tokenizer, write_rows
from luthier import ConfigError, ModelError, compose, train
from luthier.commands.cli import dispatch
from luthier.config.building import build, build_method
from luthier.config.model_config import ModelConfig
from luthier.errors import LuthierError
from luthier.models.model import load_model
from luthier_plugins.commands.fold import fold

pytestmark = pytest.mark.slow

IDS = torch.arange(40, 60)[None]
ADAPTED = "model.layers.1.self_attn.q_proj"
OTHER = "model.layers.0.mlp.down_proj"
QUANTISED = ["quantiser=nf4", "quantiser.double_quant=false"]


def saved(path, model):
    tokenizer = tiny_tokenizer()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    rows = [{"prompt": f"{number} + 1 =", "completion": f" {number + 1}"} for number in range(8)]
    write_rows(path / "rows.jsonl", rows)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    vocabulary = len(tiny_tokenizer())
    model = tiny_llama(vocab_size=vocabulary, hidden_size=64, intermediate_size=128)
    return saved(tmp_path_factory.mktemp("base"), model)


def trained(base, run_dir, *more):
    config = compose("train", [
        f"model.path={base}", "model.dtype=float32", "model.device=cpu", "data=jsonl",
        f"data.path={base}/rows.jsonl", "adapter=lora", "optimiser.lr=1e-2", "max_steps=2", "tracker=[]",
        f"run_dir={run_dir}", *more,
    ])  # fmt: skip
    train(config)
    return run_dir


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """An adapter on the q projections, trained over NF4."""
    return trained(base, tmp_path_factory.mktemp("run") / "run", "adapter.targets=[q_proj]", *QUANTISED)


def folded(run, out, *more):
    report = fold(compose("fold", [f"model.path={run}", "model.device=cpu", f"out={out}", *more]))
    return report, load_file(out / "model.safetensors")


def update(run, name):
    """``s·B A`` from PEFT's files."""
    tensors = load_file(run / "model" / "adapter_model.safetensors")
    config = json.loads((run / "model" / "adapter_config.json").read_text())
    a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    return config["lora_alpha"] / config["r"] * (b @ a)


def through_nf4(weight):
    """What bitsandbytes makes of a weight."""
    layer = bitsandbytes.nn.Linear4bit(
        weight.shape[1], weight.shape[0], False, torch.float32, compress_statistics=False, quant_type="nf4"
    )
    layer.weight = bitsandbytes.nn.Params4bit(weight, compress_statistics=False, quant_type="nf4").to("cpu")
    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def apart(found, expected):
    return (found - expected).norm().item()


def test_the_original_base_takes_the_update_and_the_report_says_what_rounding_lost(base, run, tmp_path):
    report, tensors = folded(run, tmp_path / "out", *QUANTISED)
    own = load_file(base / "model.safetensors")
    weight, change = own[f"{ADAPTED}.weight"], update(run, ADAPTED)
    assert change.norm() > 0
    whole = weight + change
    rounded = whole.bfloat16()
    assert tensors[f"{ADAPTED}.weight"].dtype == torch.bfloat16
    # A sum in another order may round another way, where two neighbours are equally near.
    assert (tensors[f"{ADAPTED}.weight"] != rounded).float().mean() < 1e-3
    assert torch.equal(tensors[f"{OTHER}.weight"], own[f"{OTHER}.weight"].bfloat16())

    layer = next(layer for layer in report.layers if layer.name == ADAPTED)
    lost = apart(rounded.float(), whole)
    assert layer.rounding_of_update == pytest.approx(lost / change.norm().item(), rel=1e-3)
    assert layer.rounding_of_weight == pytest.approx(lost / whole.norm().item(), rel=1e-3)
    assert layer.update == pytest.approx(change.norm().item() / weight.norm().item(), rel=1e-4)
    quantisation = apart(through_nf4(weight), weight) / weight.norm().item()
    assert layer.quantisation == pytest.approx(quantisation, rel=1e-5)
    assert 0.05 < quantisation < 0.15

    assert [one.name for one in report.layers] == [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    kept = json.loads((tmp_path / "out" / "fold.json").read_text())
    assert kept["base"] == "original"
    assert kept["layers"][1]["rounding_of_update"] == layer.rounding_of_update
    mean = sum(one["quantisation"] for one in kept["layers"]) / 2
    assert kept["mean"]["quantisation"] == pytest.approx(mean)
    assert report.dequantised == 0


def test_the_dequantised_base_is_the_one_that_training_saw(base, run, tmp_path):
    more = ["base=dequantised", "dtype=float32", *QUANTISED]
    report, tensors = folded(run, tmp_path / "out", *more)
    own = load_file(base / "model.safetensors")
    expected = through_nf4(own[f"{ADAPTED}.weight"]) + update(run, ADAPTED)
    assert torch.allclose(tensors[f"{ADAPTED}.weight"], expected, atol=1e-6)
    # A layer without adapter too, and nothing that was not quantised.
    assert torch.equal(tensors[f"{OTHER}.weight"], through_nf4(own[f"{OTHER}.weight"]))
    assert not torch.equal(tensors[f"{OTHER}.weight"], own[f"{OTHER}.weight"])
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(tensors[name], own[name])
    assert report.dequantised == 2 * 7 - 2

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert "quantization_config" not in plain.config.to_dict()
    config = compose("evaluate", [
        f"model.path={run}", "model.dtype=float32", "data=jsonl", f"data.path={base}/rows.jsonl", *QUANTISED,
    ])  # fmt: skip
    loaded = load_model(config.model, train_base=False, quantiser=build("quantiser", config.quantiser))
    with torch.no_grad():
        found, expected = plain(IDS).logits, loaded.model(IDS).logits
    assert apart(found, expected) < 1e-5 * expected.norm().item()


@pytest.mark.parametrize(
    "adapter",
    [
        ["adapter=lora", "adapter.init=pissa"],
        ["adapter=dora", "adapter.rank=4"],
        ["adapter=vera", "adapter.rank=8"],
    ],
    ids=lambda one: one[-1],
)
@pytest.mark.parametrize("over", [[], ["quantiser=int8"]], ids=["dense", "int8"])
def test_the_function_of_any_adapter_stays(base, tmp_path, adapter, over):
    run = trained(base, tmp_path / "run", *adapter, *over)
    more = ["dtype=float32", *over, *(["base=dequantised"] if over else [])]
    folded(run, tmp_path / "out", *more)
    quantiser = build_method("quantiser", {"name": "int8"}) if over else None
    config = ModelConfig(path=str(run), dtype="float32", device="cpu")
    loaded = load_model(config, train_base=False, quantiser=quantiser)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        found, expected = plain(IDS).logits, loaded.model(IDS).logits
    assert apart(found, expected) < 1e-4 * expected.norm().item()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


@pytest.mark.parametrize("base_of", ["original", "dequantised"])
def test_a_transposed_layer_is_written_transposed(tmp_path, base_of):
    model = tiny_gpt2(vocab_size=len(tiny_tokenizer()), n_embd=64)
    where = saved(tmp_path / "gpt2", model)
    run = trained(where, tmp_path / "run", "adapter.targets=[c_attn]", *QUANTISED)
    _, tensors = folded(run, tmp_path / "out", f"base={base_of}", "dtype=float32", *QUANTISED)
    name = "transformer.h.0.attn.c_attn"
    weight = load_file(where / "model.safetensors")[f"{name}.weight"]
    kept = weight if base_of == "original" else through_nf4(weight.T.contiguous()).T
    assert torch.allclose(tensors[f"{name}.weight"], kept + update(run, name).T, atol=1e-6)


def test_a_checkpoint_wider_than_what_is_written_is_rounded_once(base, tmp_path):
    run = trained(base, tmp_path / "run", "adapter.targets=[q_proj]", "model.dtype=bfloat16")
    _, tensors = folded(run, tmp_path / "out", "dtype=float32")
    weight = load_file(base / "model.safetensors")[f"{ADAPTED}.weight"]
    # The checkpoint is fp32: nothing of it is lost by the dtype that training ran in.
    assert torch.allclose(tensors[f"{ADAPTED}.weight"], weight + update(run, ADAPTED), atol=1e-6)


def test_an_adapter_that_changes_nothing_has_no_rounding_of_it(base, run, tmp_path):
    still = tmp_path / "still"
    shutil.copytree(run / "model", still)
    tensors = load_file(still / "adapter_model.safetensors")
    zeros = {name: torch.zeros_like(one) if "lora_B" in name else one for name, one in tensors.items()}
    save_file(zeros, still / "adapter_model.safetensors", metadata={"format": "pt"})
    report, _ = folded(still, tmp_path / "out")
    assert {one.rounding_of_update for one in report.layers} == {None}
    assert report.mean["rounding_of_update"] is None
    json.loads((tmp_path / "out" / "fold.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ([], r"trained over quantiser=nf4, and is folded into the original weights"),
        (["quantiser=nf4"], r'trained over quantiser .*"double_quant": false.* folded with .*true'),
        (QUANTISED, None),
    ],
)
def test_a_base_that_training_did_not_see_is_said(run, tmp_path, caplog, more, told):
    with caplog.at_level(logging.WARNING, "luthier"):
        folded(run, tmp_path / "out", *more)
    if told is None:
        assert not caplog.messages
    else:
        (message,) = caplog.messages
        assert re.search(told, message)


def test_what_cannot_be_folded_is_one_line(base, run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for path, more, error, told in (
        (run, [f"out={tmp_path}/full"], ConfigError, "is there and not empty; choose another folder"),
        (run, [], ConfigError, "out=FOLDER must be set"),
        (base, [f"out={tmp_path}/x"], ModelError, "has no adapter to fold; give model.path=RUN"),
        (run, [f"out={tmp_path}/x", "base=dequantised"], ConfigError, "needs the quantiser that the adapter"),
        (run, [f"out={tmp_path}/x", "base=dequantized"], ConfigError, "did you mean 'dequantised'"),
        (run, [f"out={tmp_path}/x", "dtype=bf16"], ConfigError, "unknown dtype 'bf16'.*bfloat16"),
        (run, [f"out={tmp_path}/x", "optimiser=adamw"], LuthierError, "optimiser"),
    ):
        with pytest.raises(error, match=told) as caught:
            fold(compose("fold", [f"model.path={path}", *more]))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()
    with pytest.raises(LuthierError, match="fold writes one model; leave out -m"):
        dispatch(["fold", "-m", f"model.path={run}", f"out={tmp_path}/x"])


def test_the_command_shows_the_worst_layers(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    trained(base, tmp_path / "run")
    assert dispatch(["fold", "model.path=run", "out=plain"]) == 0
    shown = capsys.readouterr().out
    assert "14 layers folded into the original weights, in bfloat16" in shown
    report = json.loads((tmp_path / "plain" / "fold.json").read_text())
    worst = sorted(report["layers"], key=lambda one: -one["rounding_of_update"])
    assert worst[0]["name"] in shown
    assert worst[4]["name"] in shown
    assert worst[5]["name"] not in shown
    assert "mean of 14" in shown
    assert "quantisation" not in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "run"]
