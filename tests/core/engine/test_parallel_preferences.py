"""Two processes prefer as one does: the reference, KTO's pooled divergence and steps of an odd size."""

import json

import pytest
from safetensors.torch import load_file

from helpers import save_tiny, write_rows
from launching import trained

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("parallel-preferences")
    save_tiny(path / "base")
    letters = "abcdefghijk"
    pairs = [
        {"prompt": f"{a} then " * (1 + place % 4), "chosen": f" {a}{a}", "rejected": f" {a} no"}
        for place, a in enumerate(letters)
    ]
    for name, some in (
        ("", pairs),
        ("held-", [{**row, "prompt": row["prompt"] + " it"} for row in pairs[:5]]),
    ):
        write_rows(path / f"{name}pairs.jsonl", some)
        write_rows(path / f"{name}labelled.jsonl", [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in some for side in ("chosen", "rejected")
        ])  # fmt: skip
    return path


@pytest.mark.parametrize(("objective", "rows"), [("dpo", "pairs"), ("kto", "labelled")])
def test_weights_and_metrics_are_those_of_one_process(folder, tmp_path, objective, rows):
    # adamw's eps is wide, so that a gradient of nearly zero has no sign to disagree on.
    given = [
        f"model.path={folder}/base", "model.dtype=float32", "model.device=cpu", "data=jsonl",
        f"data.path={folder}/{rows}.jsonl", f"objective={objective}", "adapter.rank=4", "adapter.dropout=0",
        "batch_size=5", "pack_tokens=48", "epochs=2", "optimiser.lr=1e-2", "optimiser.eps=1e-2",
        "log_every=1", "tracker=[metrics]", "evaluation.generate=false",
        "data@eval_data=jsonl", f"eval_data.path={folder}/held-{rows}.jsonl",
    ]  # fmt: skip
    found = {way: trained(way, tmp_path / way, *given) for way in ("one", "ddp")}
    one, two = (load_file(tmp_path / way / "model/adapter_model.safetensors") for way in found)
    for name, tensor in two.items():
        assert (tensor - one[name]).norm() <= 1e-5 * one[name].norm(), name
    for when in ("before", "after"):
        expected = found["one"][when]["metrics"]
        assert expected
        assert found["ddp"][when]["metrics"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    told = [
        [json.loads(line)["metrics"] for line in (tmp_path / way / "metrics.jsonl").read_text().splitlines()]
        for way in found
    ]
    assert len(told[0]) == len(told[1])
    for single, double in zip(*told, strict=True):
        assert double == pytest.approx(single, rel=1e-3, abs=1e-5)
