"""A disk that is full while a result is written: one line, status 2, nothing half written, nothing lost."""

import pytest

from helpers import save_tiny, write_rows
from killing import ShortOfDisk, forked
from luthier import compose, train
from luthier_plugins.commands.fold import fold
from luthier_plugins.commands.merge import merge

pytestmark = pytest.mark.slow
SHORT = 20_000
"""Bytes that a file may have: less than the weights, more than what lies beside them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("full")
    save_tiny(path / "base")
    write_rows(path / "rows.jsonl", [{"prompt": f"{a} then", "completion": a} for a in "abcd"])
    for name, more in {"adapter": [], "one": ["adapter=full"], "two": ["adapter=full", "seed=1"]}.items():
        train(run(path, path / name, *more))
    return path


def run(folder, out, *more):
    return compose("train", [
        f"model.path={folder}/base", "model.dtype=float32", "data=jsonl", f"data.path={folder}/rows.jsonl",
        "max_steps=2", "tracker=[metrics]", f"run_dir={out}", "resume=auto", *more,
    ])  # fmt: skip


def files(folder):
    return {path.relative_to(folder) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "more", [["adapter=full"], ["adapter=lora", "adapter.rank=16"]], ids=["full", "lora"]
)
def test_c_a_run_that_cannot_write_its_result_goes_on_once_there_is_room(folder, tmp_path, more):
    config = run(folder, tmp_path / "run", *more)
    ((status, said),) = forked((lambda: train(config), ShortOfDisk("/.model.", SHORT)))
    assert status == 2, said
    assert said.startswith(f"{tmp_path}/run/model cannot be written: ")
    assert said.endswith("make room, and go on from the last checkpoint: resume=auto")
    assert "\n" not in said
    assert not [path for path in files(tmp_path) if "model" in path.name]
    assert (tmp_path / "run/checkpoints/step-00000002/manifest.json").exists()
    assert forked((lambda: train(config), None)) == [(0, "")]
    whole = train(run(folder, tmp_path / "whole", *more))
    for file in whole.model_dir.glob("*.safetensors"):
        assert (tmp_path / "run/model" / file.name).read_bytes() == file.read_bytes()


def test_c_a_fold_that_cannot_be_written_leaves_nothing(folder, tmp_path):
    config = compose("fold", [f"model.path={folder}/adapter/model", f"out={tmp_path}/folded"])
    ((status, said),) = forked((lambda: fold(config), ShortOfDisk(".folded.", SHORT)))
    assert status == 2, said
    assert said.startswith(f"{tmp_path}/folded cannot be written: ")
    assert not files(tmp_path)
    assert forked((lambda: fold(config), None)) == [(0, "")]


@pytest.mark.parametrize("result", ["model", "adapter"])
def test_c_a_merge_that_cannot_be_written_goes_on(folder, tmp_path, result):
    models = ["adapter", "adapter"] if result == "adapter" else ["one", "two"]
    named = ",".join(f"m{place}: {folder}/{name}" for place, name in enumerate(models))
    config = compose("merge", [
        f"models={{{named}}}", "merger=soup", f"result={result}", f"run_dir={tmp_path}/run", "resume=auto"
    ])  # fmt: skip
    ((status, said),) = forked((lambda: merge(config), ShortOfDisk(f"{tmp_path}/run", SHORT)))
    assert status == 2, said
    assert said.startswith(f"{tmp_path}/run/model cannot be written: ")
    assert not (tmp_path / "run/model").exists()
    assert forked((lambda: merge(config), None)) == [(0, "")]
    assert not [path for path in files(tmp_path) if path.name.startswith(".")]


def test_e_a_result_that_was_removed_is_written_again_from_the_checkpoint(folder, tmp_path, caplog):
    first = train(run(folder, tmp_path / "run"))
    (weights,) = first.model_dir.glob("*.safetensors")
    content = weights.read_bytes()
    weights.unlink()
    again = train(run(folder, tmp_path / "run"))
    assert "has no weights any more: they are written again from the last checkpoint" in caplog.text
    assert weights.read_bytes() == content
    assert (again.steps, again.last_loss) == (first.steps, first.last_loss)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(lines) == len({line.partition(",")[0] for line in lines})


def test_e_a_result_that_was_removed_without_checkpoints_is_told(folder, tmp_path):
    first = train(run(folder, tmp_path / "run", "checkpoint.every=0"))
    for file in first.model_dir.iterdir():
        file.unlink()
    config = run(folder, tmp_path / "run", "checkpoint.every=0")
    ((status, said),) = forked((lambda: train(config), None))
    assert status == 2
    assert said.startswith(f"{tmp_path}/run holds no whole checkpoint to go on from")
