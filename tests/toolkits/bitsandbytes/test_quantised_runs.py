"""Runs over quantised bases, end to end: they learn, go on bit for bit, are measured as they were trained."""

import itertools

import pytest
import torch
from safetensors.torch import load_file

from helpers import tiny_llama, tiny_tokenizer, write_rows
from luthier import compose, evaluate, hookimpl, train
from luthier.config.model_config import ModelConfig
from luthier.models.model import load_model
from luthier.registry.method_catalogue import catalogue
from luthier.runs.state import trained_tensors
from luthier_plugins.quantisers.nf4 import NF4

pytestmark = pytest.mark.slow

ADAPTERS = {
    "lora": ["adapter=lora", "adapter.rank=4", "adapter.dropout=0.2"],
    "pissa": ["adapter=lora", "adapter.rank=4", "adapter.init=pissa"],
    "dora": ["adapter=dora", "adapter.rank=4"],
    "vera": ["adapter=vera", "adapter.rank=8"],
}
QUANTISERS = ["nf4", "int8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantised")
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128)
    model.save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")
    rows = [{"prompt": f"{a}{b} ->", "completion": f" {b}{a}"} for a, b in itertools.product("abcd", "ghij")]
    write_rows(path / "rows.jsonl", rows)
    held = [{"prompt": f"{a} ->", "completion": f" {a}"} for a in "abc"]
    write_rows(path / "held.jsonl", held)
    return path


def overrides(folder, run_dir, quantiser, *more):
    return [
        f"model.path={folder}/base", "model.dtype=bfloat16", "model.device=cpu", f"quantiser={quantiser}",
        "data=jsonl", f"data.path={folder}/rows.jsonl", "data@eval_data=jsonl",
        f"eval_data.path={folder}/held.jsonl", "evaluation.max_new_tokens=2", "batch_size=4",
        "optimiser.lr=1e-2", "max_steps=6", "checkpoint.every=2", "log_every=1", f"run_dir={run_dir}",
        "tracker=[]", *more,
    ]  # fmt: skip


class Stop:
    """Ends a run after its step 3, as a crash would."""

    @hookimpl
    def after_step(self, report):
        if report.step == 3:
            raise RuntimeError("the power is gone")


def crash(arguments):
    hooks, stop = catalogue().hooks, Stop()
    hooks.register(stop)
    try:
        with pytest.raises(RuntimeError, match="the power"):
            train(compose("train", arguments))
    finally:
        hooks.unregister(stop)


def weights(result):
    return load_file(result.model_dir / "adapter_model.safetensors")


@pytest.mark.parametrize("quantiser", QUANTISERS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_run_learns_and_a_crashed_one_goes_on_to_the_same_bits(folder, tmp_path, quantiser, adapter):
    # The whole run is evaluated before it trains; the one that goes on is not.
    arguments = [quantiser, *ADAPTERS[adapter]]
    whole = train(compose("train", overrides(folder, tmp_path / "whole", *arguments)))
    assert whole.last_loss < whole.first_loss
    assert whole.before is not None
    crash(overrides(folder, tmp_path / "run", *arguments))
    result = train(compose("train", [f"resume={tmp_path}/run"]))
    assert result.last_loss == whole.last_loss
    found, expected = weights(result), weights(whole)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_recomputing_activations_changes_no_loss(folder, tmp_path, quantiser):
    losses = [
        train(compose("train", [
            *overrides(folder, tmp_path / str(flag), quantiser, *ADAPTERS["lora"], "max_steps=3"),
            "model.dtype=float32", f"model.gradient_checkpointing={flag}",
        ])).last_loss
        for flag in (True, False)
    ]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_a_result_is_measured_over_its_quantiser(folder, tmp_path, quantiser):
    result = train(compose("train", overrides(folder, tmp_path / "run", quantiser, *ADAPTERS["lora"])))

    def measured(name, over):
        return evaluate(compose("evaluate", [
            f"model.path={result.run_dir}", "model.dtype=bfloat16", "model.device=cpu", "data=jsonl",
            f"data.path={folder}/held.jsonl", "evaluation.max_new_tokens=2", f"quantiser={over}",
            "tracker=[]", f"run_dir={tmp_path}/{name}",
        ]))  # fmt: skip

    assert measured("same", quantiser).loss == pytest.approx(result.after.loss, rel=1e-5)
    assert measured("dense", "none").loss != pytest.approx(result.after.loss, rel=1e-5)
    assert result.total_parameters > 2 * 4 * 64 * 64


def test_a_checkpoint_that_was_quantised_before_trains_like_one_quantised_here(folder, tmp_path):
    config = ModelConfig(path=f"{folder}/base", dtype="bfloat16", device="cpu")
    stored = load_model(config, train_base=False, quantiser=NF4())
    stored.model.save_pretrained(tmp_path / "base")
    stored.tokenizer.save_pretrained(tmp_path / "base")
    here = train(compose("train", overrides(folder, tmp_path / "here", "nf4", *ADAPTERS["lora"])))
    more = [*ADAPTERS["lora"], f"model.path={tmp_path}/base"]
    before = train(compose("train", overrides(folder, tmp_path / "before", "none", *more)))
    assert before.last_loss == here.last_loss
    found, expected = weights(before), weights(here)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_a_checkpoint_holds_the_adapter_alone(folder, tmp_path, quantiser):
    train(compose("train", overrides(folder, tmp_path / "run", quantiser, *ADAPTERS["lora"])))
    (kept,) = (tmp_path / "run" / "checkpoints").glob("*6*/weights.safetensors")
    names = load_file(kept).keys()
    assert len(names) == 2 * 14
    assert all("lora_" in name for name in names)
    config = ModelConfig(path=f"{folder}/base", dtype="bfloat16", device="cpu")
    assert (
        trained_tensors(load_model(config, train_base=False, quantiser=NF4()).model.requires_grad_(False))
        == {}
    )
