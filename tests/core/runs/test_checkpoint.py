"""Checkpoints: whole or not there, believed only when every byte is what was written, safe to load."""

import errno
import json
import logging

import pytest
import torch

from luthier import LuthierError
from luthier.runs import checkpoint, remove_leftovers
from luthier.runs.checkpoint import Checkpoints, fault_of
from luthier.runs.state import Snapshot, flatten, unflatten
from luthier.system import written_whole


def snapshot(value: float = 1.0) -> Snapshot:
    tensors = {"weights": {"w": torch.full((4, 4), value)}, "rows": {"train": torch.arange(3)}}
    return Snapshot(tensors, {"progress": {"step": 3}})


def write(checkpoints, step, **more):
    return checkpoints.write(step, snapshot(step), "seed: 0\n", {"luthier": "0.1.0"}, **more)


def test_what_is_written_is_read_back(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    folder = write(checkpoints, 7)
    found = checkpoints.newest()
    assert (found.folder, found.step) == (folder, 7)
    loaded = found.load()
    assert torch.equal(loaded.tensors["weights"]["w"], torch.full((4, 4), 7.0))
    assert loaded.values == {"progress": {"step": 3}}
    assert (found.config(), found.lock()) == ("seed: 0\n", {"luthier": "0.1.0"})
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors", ".yaml"}  # nothing can run


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", "config.yaml", "manifest.json"])
def test_a_flipped_byte_is_noticed_and_the_one_before_is_used(tmp_path, caplog, name):
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 1)
    damaged = write(checkpoints, 2) / name
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0x10
    damaged.write_bytes(content)
    with caplog.at_level(logging.WARNING, "luthier"):
        found = checkpoints.newest()
    assert found.step == 1
    assert "step-00000002 is damaged" in caplog.text
    assert "the checkpoint before it is used" in caplog.text


def test_a_missing_or_cut_file_is_noticed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    folder = write(checkpoints, 1)
    (folder / "state.json").write_bytes(b"{")
    assert "state.json has 1 bytes, expected" in fault_of(folder)
    (folder / "state.json").unlink()
    assert fault_of(folder) == "state.json is missing"
    assert checkpoints.newest() is None
    with pytest.raises(LuthierError, match=r"damaged: state\.json is missing"):
        checkpoints.at(1)


def test_only_the_newest_stay_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        write(checkpoints, step, best=1)
    assert checkpoints.steps() == [1, 3, 4]


def test_e_what_a_killed_run_left_half_written_is_removed_and_nothing_that_is_being_written(tmp_path):
    for name in (".model.0a1b2c3d.new", "..model.0a1b2c3d.new.0123abcd.old", ".step-1.99999999.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("half")
    for name in (".model", ".model.notahash.new", "model.0a1b2c3d.new"):
        (tmp_path / name).mkdir()
    with written_whole(tmp_path / "model") as fresh:
        remove_leftovers(tmp_path, "model")
        assert (tmp_path / ".step-1.99999999.new").exists()
        remove_leftovers(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {
            fresh.name, ".model", ".model.notahash.new", "model.0a1b2c3d.new"
        }  # fmt: skip
    remove_leftovers(tmp_path / "nowhere")


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 1)

    def full(text, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_flush", lambda path: full("", path))
    with pytest.raises(
        LuthierError, match=r"cannot be written: No space left on device; that of step 1 is kept"
    ):
        write(checkpoints, 2)
    assert checkpoints.steps() == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_nested_state_survives_json_and_tensors():
    state = {
        "state": {0: {"step": torch.tensor(3.0), "pair": (1, torch.ones(2))}},
        "param_groups": [{"betas": (0.9, 0.999), "lr": 0.1 + 0.2, "name": None, "params": [0]}],
    }
    tensors: dict[str, torch.Tensor] = {}
    back = unflatten(json.loads(json.dumps(flatten(state, tensors, "o"))), tensors)
    assert back["param_groups"] == state["param_groups"]
    assert back["state"].keys() == {0}
    assert torch.equal(back["state"][0]["pair"][1], torch.ones(2))


def test_state_that_could_run_code_is_refused():
    with pytest.raises(LuthierError, match=r"optimiser.projector is a object; a checkpoint holds tensors"):
        flatten({"projector": object()}, {}, "optimiser")
