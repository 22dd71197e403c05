"""A run on the result of another: its adapter goes on training, and is the reference."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file

from helpers import save_tiny, write_rows
from luthier import ConfigError, compose, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("staged")
    save_tiny(path / "base")
    letters = "abcdefgh"
    rows = [{"prompt": f"{a} then", "completion": f" {a}{a}"} for a in letters]
    pairs = [{"prompt": f"{a} then", "chosen": f" {a}{a}", "rejected": f" {a} no"} for a in letters]
    for name, lines in (("rows", rows), ("pairs", pairs)):
        write_rows(path / f"{name}.jsonl", lines)
    train(compose("train", given(path, path / "first", "base", "rows", "objective=sft", "adapter.rank=4")))
    return path


def given(folder, run_dir, model, data, *more):
    return [
        f"model.path={folder}/{model}", "model.dtype=float32", "data=jsonl",
        f"data.path={folder}/{data}.jsonl", "batch_size=8", "optimiser.lr=1e-2", "epochs=4", "log_every=1",
        f"run_dir={run_dir}", "tracker=[metrics]", "adapter.dropout=0", *more,
    ]  # fmt: skip


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def tensors(run):
    return load_file(run / "model" / "adapter_model.safetensors")


def test_the_adapter_goes_on_and_is_where_the_reference_starts(folder, tmp_path):
    result = train(compose("train", given(folder, tmp_path / "run", "first", "pairs", "objective=dpo")))
    assert losses(tmp_path / "run")[0] == pytest.approx(0.6931, abs=1e-4)
    before, after = tensors(folder / "first"), tensors(tmp_path / "run")
    assert before.keys() == after.keys()
    assert all(after[name].shape == before[name].shape for name in before)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    # Rank 4 of the first run, though the default is 16; nothing else trains.
    assert result.trainable_parameters == sum(value.numel() for value in before.values())
    config = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, str(folder / "base"))


def test_supervised_training_goes_on_where_it_was(folder, tmp_path):
    train(compose("train", given(folder, tmp_path / "run", "first", "rows", "objective=sft")))
    assert losses(tmp_path / "run")[0] < 0.7 * losses(folder / "first")[0]


def test_an_option_that_is_not_used_is_told(folder, tmp_path, caplog):
    more = ["objective=sft", "adapter.rank=8", "max_steps=1"]
    with caplog.at_level(logging.WARNING, "luthier"):
        train(compose("train", given(folder, tmp_path / "run", "first", "rows", *more)))
    assert "adapter.rank=8 is not used: the adapter in" in caplog.text
    assert "was made with 4" in caplog.text


@pytest.mark.parametrize("adapter", ["dora", "full"])
def test_another_kind_is_refused_with_a_way_out(folder, tmp_path, adapter):
    arguments = given(folder, tmp_path / "run", "first", "rows", f"adapter={adapter}")
    arguments = [one for one in arguments if adapter == "dora" or not one.startswith("adapter.")]
    told = rf"is an adapter of the kind lora, and adapter={adapter} cannot go on with it.*luthier fold"
    with pytest.raises(ConfigError, match=told):
        train(compose("train", arguments))
    assert not (tmp_path / "run" / "config.yaml").exists()
