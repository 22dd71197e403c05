"""Configs as published checkpoints have them: trained on, saved and read back as transformers reads them."""

import json

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

from helpers import save_tiny, write_rows
from luthier import ModelError, compose, evaluate, train
from luthier.config.model_config import ModelConfig
from luthier.models.model import load_model


@pytest.fixture
def base(tmp_path):
    save_tiny(tmp_path / "base")
    write_rows(
        tmp_path / "rows.jsonl", [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(4)]
    )
    return tmp_path / "base"


def change(file, **options):
    table = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(table | options))


def overrides(base, run_dir, *more):
    return [
        f"model.path={base}", "model.dtype=float32", "model.device=cpu", "data=jsonl",
        f"data.path={base.parent}/rows.jsonl", f"run_dir={run_dir}", *more,
    ]  # fmt: skip


def trained(base, run_dir, *more):
    return train(
        compose("train", overrides(base, run_dir, "max_steps=1", "batch_size=4", "tracker=[]", *more))
    )


@pytest.mark.parametrize("ends", [[2, 3], [], [2, 99999]], ids=str)
def test_a_config_may_name_several_ends(base, tmp_path, ends):
    """As Llama 3.1's does, in config.json itself."""
    change(base / "config.json", eos_token_id=ends)
    report = evaluate(compose("evaluate", overrides(base, tmp_path / "e", "evaluation.max_new_tokens=2")))
    assert trained(base, tmp_path / "run", "adapter=lora").first_loss == pytest.approx(report.loss, rel=1e-4)


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False, "temperature": 0.9, "top_p": 0.6},  # Llama 2's
        {"temperature": 0.0},
        {"early_stopping": True},
    ],
    ids=str,
)
def test_what_a_checkpoint_came_with_is_saved_with_the_result(base, tmp_path, adapter, options):
    """transformers refuses to save it as soon as one value has changed."""
    change(base / "generation_config.json", **options)
    result = trained(base, tmp_path / "run", f"adapter={adapter}")
    saved = GenerationConfig.from_pretrained(result.model_dir).to_dict()
    assert {key: saved[key] for key in options} == options
    if adapter == "full":
        AutoModelForCausalLM.from_pretrained(result.model_dir)


@pytest.mark.parametrize("ends", [10**30, [2, 10**30]])
def test_an_end_beyond_all_vocabularies_is_refused(base, ends):
    change(base / "generation_config.json", eos_token_id=ends)
    with pytest.raises(ModelError, match=r"eos_token_id=.*expected ids of tokens"):
        load_model(ModelConfig(path=str(base), device="cpu"), train_base=False)
