"""Two processes answer half of the prompts each, learn from all of them, and go on where they stopped."""

import json

import pytest
import torch
from safetensors.torch import load_file

from helpers import save_tiny, write_rows
from launching import run_forked, trained

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    path = tmp_path_factory.mktemp("parallel-rollouts")
    save_tiny(path / "base")
    write_rows(path / "rows.jsonl", [{"prompt": f"{a} then", "completion": a} for a in "abcdefgh"])
    return [
        f"model.path={path}/base", "model.dtype=float32", "model.device=cpu", "data=jsonl",
        f"data.path={path}/rows.jsonl", "objective=ppo",
        "objective.rollout_batch_size=8", "objective.rollout_epochs=3",
        "objective.max_new_tokens=4", "reward_model=[length]", "batch_size=4",
        "optimiser.lr=1e-2", "log_every=1", "schedule.name=constant", "schedule.warmup=0",
        "tracker=[metrics]",
    ]  # fmt: skip


def test_what_two_rolled_out_is_one_rollout_and_goes_on_bit_by_bit(given, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    summary = trained("ddp", whole, *given, "max_steps=8")
    assert summary["steps"] == 8
    told = [json.loads(line) for line in (whole / "rollouts/00000000.jsonl").read_text().splitlines()]
    assert sorted(line["origin"].rpartition(":")[2] for line in told) == list("12345678")
    first = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])["metrics"]
    assert first["reward"] == pytest.approx(sum(line["score"] for line in told) / 8)
    trained("ddp", run, *given, "max_steps=4")  # in the middle of the first rollout's six steps
    trained("ddp", run, f"resume={run}", "max_steps=8")
    one, other = (load_file(path / "model/adapter_model.safetensors") for path in (whole, run))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_sharded_model_cannot_answer(given, tmp_path):
    for errors in run_forked("fsdp2", "train", *given, f"run_dir={tmp_path}/run", status=2):
        assert "objective=ppo answers with the whole model" in errors
