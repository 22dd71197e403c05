"""Token trees and whole runs on a CUDA device, beside the same on the CPU."""

import itertools

import pytest
import torch

from helpers import plain_values, save_tiny, tiny_llama, write_rows
from luthier import Branch, ModelPolicy, Pack, Tree, compose, train

TREES = [Tree((1, 2, 3), (Branch((4, 5, 6)), Branch((7, 8)))), Tree((9, 10), (Branch((11,)),))]


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-3), (torch.bfloat16, 0.3)])
def test_token_trees_have_the_values_of_plain_forwards_on_the_cpu(cuda, dtype, off):
    expected = plain_values(tiny_llama().eval(), TREES)
    policy = ModelPolicy(tiny_llama().eval().to(cuda, dtype))
    policy.check()
    values = policy.logprobs(Pack.of(TREES, cuda)).values.cpu()
    assert torch.allclose(values, expected, atol=off)


@pytest.mark.parametrize("adapter", ["full", "lora", "dora"])
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_a_run_on_the_device_learns_what_one_on_the_cpu_learns(tmp_path, monkeypatch, adapter, objective):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base")
    rows = [
        {"prompt": f"{a} ->", "completion": f" {b}", "chosen": f" {b}", "rejected": f" {a}"}
        for a, b in itertools.pairwise("abcdefghij")
    ]
    wanted = ("prompt", "completion") if objective == "sft" else ("prompt", "chosen", "rejected")
    write_rows(tmp_path / "rows.jsonl", [{key: row[key] for key in wanted} for row in rows])
    options = ["model.path=base", "model.dtype=float32", "data=jsonl", "data.path=rows.jsonl", "max_steps=4"]
    options += [f"adapter={adapter}", f"objective={objective}", "optimiser.lr=1e-3", "batch_size=4"]
    # Dropout masks differ from device to device.
    options += [] if adapter == "full" else ["adapter.dropout=0"]
    losses = {
        device: train(compose("train", [*options, f"model.device={device}", f"run_dir={device}"])).last_loss
        for device in ("cpu", "cuda")
    }
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)
