"""Two processes do what one does: the same gradients, losses and result, by copies (DDP) or parts (FSDP2)."""

import itertools
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from helpers import save_tiny
from launching import LAUNCH, launched, run_forked, trained
from luthier import ConfigError, Tree
from luthier.system.processes import Processes, _buckets
from luthier.trees.tree import Branch, cut

pytestmark = pytest.mark.slow

WAYS = list(LAUNCH)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("parallel")
    # Tied embeddings: the head that the loss reads is a parameter of the first layer.
    save_tiny(path / "base", tie_word_embeddings=True)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = [
        {"prompt": f"{a} {b} " * (5 + number % 17), "completion": f" {b} {a}"}
        for number, (a, b) in enumerate(itertools.permutations(words, 2))
    ]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:21]))
    (path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[30:35]))
    return path


def options(folder, *more):
    return [
        f"model.path={folder}/base", "model.dtype=float32", "model.device=cpu", "data=jsonl",
        f"data.path={folder}/rows.jsonl", "tracker=[]", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def steps(folder):
    """The gradients of one step by way of running."""
    found = {}
    for way in WAYS:
        (folder / way).mkdir()
        run_forked(way, str(folder / way), *options(folder), module="one_step")
        found |= {(way, path.stem): load_file(path) for path in (folder / way).iterdir()}
    return found


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_depend_on_neither_packing_nor_processes(steps, way, adapter):
    expected, found = steps["one", adapter], steps[way, adapter]
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        reference = expected["2048." + name.partition(".")[2]]
        assert reference.norm() > 0
        assert (gradient - reference).norm() <= 1e-5 * reference.norm(), (way, name)


@pytest.fixture(scope="module")
def runs(folder):
    """Twenty steps by way of running, with evaluations, checkpoints and the saved model."""
    more = ["adapter=full", "max_steps=20", "batch_size=8", "log_every=1", "checkpoint.every=10",
            "tracker=[metrics]", "optimiser.lr=1e-3", "data@eval_data=jsonl",
            f"eval_data.path={folder}/held.jsonl", "evaluation.max_new_tokens=4"]  # fmt: skip
    arguments = options(folder, *more)
    arguments.remove("tracker=[]")
    return {way: trained(way, folder / f"run-{way}", *arguments) for way in WAYS}


def losses(folder, way):
    lines = (folder / f"run-{way}" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_losses_and_results_are_those_of_one_process(folder, runs, way):
    one, two = losses(folder, "one"), losses(folder, way)
    assert len(one) == len(two) == 20
    assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(one, two, strict=True))
    for key in ("steps", "tokens", "total_parameters", "trainable_parameters"):
        assert runs[way][key] == runs["one"][key], key
    assert math.isclose(runs[way]["after"]["loss"], runs["one"]["after"]["loss"], rel_tol=1e-4)
    assert [s["origin"] for s in runs[way]["after"]["samples"]] == [
        s["origin"] for s in runs["one"]["after"]["samples"]
    ]
    close(folder / f"run-{way}/model", folder / "run-one/model")


def close(model, other):
    found, expected = (load_file(folder / "model.safetensors") for folder in (model, other))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert (tensor - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


@pytest.mark.parametrize(
    ("saved", "resumed"), [("fsdp2", "one"), ("one", "fsdp2"), ("ddp", "one"), ("one", "ddp")]
)
def test_a_run_goes_on_in_another_number_of_processes(folder, runs, tmp_path, saved, resumed):
    run = tmp_path / "run"
    shutil.copytree(folder / f"run-{saved}", run)
    shutil.rmtree(run / "checkpoints/step-00000020")
    shutil.rmtree(run / "model")
    (run / "summary.json").unlink()
    # Its checkpoints hold the old run_dir, which may change.
    summary = trained(resumed, run, f"resume={run}")
    assert summary["steps"] == 20
    close(run / "model", folder / "run-one/model")


def test_one_bad_row_ends_all_processes_with_its_name(folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text((folder / "rows.jsonl").read_text() + "{broken\n")
    told = launched("ddp", "--module", "luthier", "train", *options(folder, f"run_dir={tmp_path}/run"),
                    f"data.path={rows}", fails=True)  # fmt: skip
    assert "rows.jsonl:22: not JSON" in told.stderr


def test_others_wait_for_the_main_process_longer_than_a_collective_would(tmp_path):
    run_forked("ddp", str(tmp_path), module="waiting")
    seen = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert seen == dict.fromkeys(["done0", "done1", "saw00", "saw01", "saw10", "saw11"], "0")


def test_one_device_for_several_processes_is_refused(folder, tmp_path):
    told = run_forked("ddp", "train", *options(folder, f"run_dir={tmp_path}/run"), "model.device=cpu:0",
                      status=2)  # fmt: skip
    assert "model.device=cpu:0 would put 2 processes on one device" in "".join(told)


def test_processes_that_are_not_supported_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="DeepSpeed is not supported"):
        Processes.launched()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="FSDP1 is superseded"):
        Processes.launched()


def test_there_are_packs_for_every_process():
    trees = [Tree((1,) * size, (Branch((2, 3)),)) for size in (50, 3, 9, 20, 8, 7, 60)]
    for processes in (1, 2, 3, 4):
        packs = cut(trees, 64, processes)
        assert len(packs) % processes == 0
        assert sorted(i for pack in packs for i in pack) == list(range(7))
        assert all(sum(trees[i].tokens for i in pack) <= 64 for pack in packs)
    assert len(cut(trees[:1], 64, 2)) == 1  # one tree cannot be shared out


def test_gradients_travel_in_buckets_of_one_dtype(monkeypatch):
    monkeypatch.setattr("luthier.system.processes.BUCKET", 10)
    sizes = [4, 4, 4, 30, 2]
    tensors = [torch.zeros(size) for size in sizes] + [torch.zeros(2, dtype=torch.bfloat16)]
    found = [[len(tensor) for tensor in bucket] for bucket in _buckets(tensors)]
    assert found == [[4, 4], [4], [30], [2], [2]]


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_fewer_rows_than_processes_hang_nothing(folder, tmp_path, way):
    # One process answers a prompt, the other none: generation must wait for nobody.
    lines = (folder / "rows.jsonl").read_text().splitlines()
    (tmp_path / "one.jsonl").write_text(lines[0] + "\n")
    (tmp_path / "other.jsonl").write_text(lines[1] + "\n")
    more = ["batch_size=1", "max_steps=3", "data@eval_data=jsonl", f"eval_data.path={tmp_path}/other.jsonl",
            "evaluation.every=1", "evaluation.restore_best=true", "model.gradient_checkpointing=true",
            "adapter.targets=[q_proj]", "adapter.dropout=0", f"data.path={tmp_path}/one.jsonl"]  # fmt: skip
    two = trained(way, tmp_path / "two", *options(folder, *more))
    one = trained("one", tmp_path / "one", *options(folder, *more))
    assert (two["steps"], two["after"]["scored"]) == (3, 1)
    assert math.isclose(two["after"]["loss"], one["after"]["loss"], rel_tol=1e-4)
    found, expected = (
        load_file(tmp_path / run / "model/adapter_model.safetensors") for run in ("two", "one")
    )
    for name, tensor in found.items():
        assert (tensor - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


def test_processes_that_would_shard_evaluate(folder, tmp_path):
    arguments = [f"model.path={folder}/base", "data=jsonl", f"data.path={folder}/held.jsonl",
                 "model.dtype=float32", "evaluation.max_new_tokens=4"]  # fmt: skip
    for way in ("one", "fsdp2"):
        run_forked(way, "evaluate", *arguments, f"run_dir={tmp_path}/{way}")
    one, two = (json.loads((tmp_path / way / "summary.json").read_text()) for way in ("one", "fsdp2"))
    assert math.isclose(two["loss"], one["loss"], rel_tol=1e-5)
    assert two["samples"] == one["samples"]
