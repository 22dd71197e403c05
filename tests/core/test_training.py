"""`train` and `evaluate` end to end on a tiny model, through the Python twins."""

import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import tiny_llama, tiny_tokenizer
from luthier import ConfigError, DataError, compose, evaluate, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder and a file of rows: the model learns to answer each letter with the next."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")
    letters = "abcdefghijklmnop"
    rows = [{"prompt": f"{a} ->", "completion": f" {b}"} for a, b in itertools.pairwise(letters)]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = [{"prompt": f"{a} -> ", "completion": f" {b}"} for a, b in zip("abc", "bcd", strict=True)]
    (path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    return path


def overrides(folder, run_dir, *more):
    return [
        f"model.path={folder}/base", "model.dtype=float32", "data=jsonl", f"data.path={folder}/rows.jsonl",
        "batch_size=8", "optimiser.lr=1e-2", f"run_dir={run_dir}", "tracker=[]", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_run_learns_saves_and_reads_back(folder, tmp_path, adapter):
    held_out = ["data@eval_data=jsonl", f"eval_data.path={folder}/held.jsonl", "evaluation.max_new_tokens=4"]
    config = compose(
        "train", overrides(folder, tmp_path / "run", f"adapter={adapter}", "epochs=10", *held_out)
    )
    result = train(config)
    assert result.steps == 20
    assert result.last_loss < 0.5 * result.first_loss
    assert result.after.loss < result.before.loss
    assert 0 <= result.after.accuracy <= 1
    assert result.after.samples[0].expected == " b"

    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 5, 10, 15, 20]
    assert lines[-1]["loss"] == result.last_loss
    summary = json.loads((result.run_dir / "summary.json").read_text())
    assert summary["after"]["loss"] == result.after.loss
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["tokens_per_second"] > 0
    assert (result.run_dir / "config.yaml").read_text().count("path: ") >= 2

    again = compose("evaluate", [
        f"model.path={result.model_dir}", "model.dtype=float32", "data=jsonl",
        f"data.path={folder}/held.jsonl",
        f"run_dir={tmp_path}/again", "evaluation.max_new_tokens=4",
    ])  # fmt: skip
    report = evaluate(again)
    assert report.loss == pytest.approx(result.after.loss, rel=1e-5)
    assert [s.answer for s in report.samples] == [s.answer for s in result.after.samples]


def test_full_saves_a_transformers_folder(folder, tmp_path):
    result = train(compose("train", overrides(folder, tmp_path / "run", "adapter=full", "max_steps=1")))
    loaded = AutoModelForCausalLM.from_pretrained(result.model_dir)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    ids = torch.tensor([[5, 6, 7]])
    assert not torch.equal(loaded(ids).logits, base(ids).logits)
    assert result.trainable_parameters == result.total_parameters == sum(p.numel() for p in base.parameters())


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(folder, tmp_path):
    def weights(name, seed):
        more = ["max_steps=3", f"seed={seed}", "adapter.dropout=0.1"]
        result = train(compose("train", overrides(folder, tmp_path / name, *more)))
        return (result.model_dir / "adapter_model.safetensors").read_bytes()

    first = weights("a", 0)
    assert first == weights("b", 0)
    assert first != weights("c", 1)


def test_gradient_checkpointing_changes_nothing_but_memory(folder, tmp_path):
    losses = [
        train(
            compose(
                "train",
                overrides(folder, tmp_path / str(flag), "max_steps=3", f"gradient_checkpointing={flag}"),
            )
        ).last_loss
        for flag in (True, False)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_run_folder_is_never_overwritten(folder, tmp_path):
    config = compose("train", overrides(folder, tmp_path / "run", "max_steps=1"))
    train(config)
    with pytest.raises(ConfigError, match="holds a run or a model already"):
        train(config)


@pytest.mark.parametrize(
    ("more", "error", "told"),
    [
        (["data.path=nowhere.jsonl"], ConfigError, "path=nowhere.jsonl: there is no such file"),
        (["epochs=0"], ConfigError, "epochs=0.0 .* no step to train"),
        (["max_length=2"], DataError, r"no usable row \(15 longer than 2 tokens\)"),
        (["schedule.name=cosin"], ConfigError, "did you mean 'cosine'"),
        (["adapter.targets=[q_prj]"], ConfigError, "q_proj"),
        (["adapter.init=zero"], ConfigError, "lora.init: 'zero' is not one of kaiming, pissa"),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, more, error, told):
    with pytest.raises(error, match=told) as caught:
        train(compose("train", overrides(folder, tmp_path / "run", *more)))
    assert "\n" not in str(caught.value)


def test_held_out_rows_that_are_all_the_data_leave_nothing(folder, tmp_path):
    same = ["data@eval_data=jsonl", f"eval_data.path={folder}/rows.jsonl"]
    with pytest.raises(ConfigError, match="nothing is left to train on"):
        train(compose("train", overrides(folder, tmp_path / "run", *same)))
