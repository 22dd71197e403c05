"""Weights & Biases for real: offline runs, whose own file is read back record by record."""

import itertools
import json
import os
import struct
import sys
import time

import pytest

from helpers import save_tiny
from luthier import ConfigError, compose, evaluate, train
from luthier.runs import write_status
from luthier_plugins.trackers.wandb.wandb import ID_FILE

pytestmark = pytest.mark.slow

pytest.importorskip("wandb")
BLOCK = 32768


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_tiny(path / "base")
    pairs = itertools.pairwise("abcdefghijklmnop")
    rows = [json.dumps({"prompt": f"{a} ->", "completion": f" {b}"}) for a, b in pairs]
    (path / "rows.jsonl").write_text("\n".join(rows[:12]))
    (path / "held.jsonl").write_text("\n".join(rows[12:]))
    return path


@pytest.fixture
def folder(base, tmp_path, monkeypatch):
    """Nothing of a person's account, settings or folders is seen, and nothing is left there."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    return base


def overrides(folder, run_dir, *more):
    return [
        f"model.path={folder}/base", "model.dtype=float32", "data=jsonl", f"data.path={folder}/rows.jsonl",
        f"run_dir={run_dir}", "tracker=[wandb]", *more,
    ]  # fmt: skip


def trained(folder, run_dir, *more):
    held_out = ["data@eval_data=jsonl", f"eval_data.path={folder}/held.jsonl", "evaluation.max_new_tokens=3"]
    steps = ["batch_size=4", "max_steps=3", "log_every=1"]
    return train(compose("train", overrides(folder, run_dir, *held_out, *steps, *more)))


def records(run_dir):
    """Return the records of the only offline run in `run_dir`, from its leveldb-style log."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    data, place, part, found = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        if place + 7 + size > len(data):  # it is being written
            break
        part += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(part))
            part = b""
    return found


def values(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def story(run_dir):
    """Return config, history, summary, exit code and the record of the run."""
    # wandb's process writes the last records just after `finish` returns.
    deadline, found = time.monotonic() + 20, records(run_dir)
    while not any(one.HasField("exit") for one in found):
        assert time.monotonic() < deadline, "the run never ended"
        time.sleep(0.05)
        found = records(run_dir)
    kinds = {
        kind: [one for one in found if one.WhichOneof("record_type") == kind]
        for kind in ("history", "summary")
    }
    run = next(one.run for one in found if one.HasField("run"))
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    history = [values(one.history.item) for one in kinds["history"]]
    summary = {}
    for one in kinds["summary"]:
        summary |= values(one.summary.update)
    exits = [one.exit.exit_code for one in found if one.HasField("exit")]
    return config, history, summary, exits, run


def test_a_run_is_there_whole_config_history_answers_and_summary(folder, tmp_path, capfd):
    result = trained(
        folder,
        tmp_path / "run",
        "trackers.wandb.project=p",
        "trackers.wandb.tags=[a,b]",
        "trackers.wandb.samples=2",
    )
    config, history, summary, exits, run = story(tmp_path / "run")
    assert (run.project, run.display_name, list(run.tags)) == ("p", "run", ["a", "b"])
    assert config["adapter"]["name"] == "lora"
    assert config["run_dir"] == str(tmp_path / "run")
    steps = [line for line in history if "train/loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert steps[-1]["train/loss"] == result.last_loss
    assert {"train/grad_norm", "train/learning_rate", "train/tokens_per_second"} <= set(steps[0])
    measured = [line for line in history if "held_out/loss" in line]
    assert [line["step"] for line in measured] == [0, 3]
    assert measured[1]["held_out/loss"] == result.after.loss
    assert summary["before_loss"] == result.before.loss
    assert summary["after_perplexity"] == result.after.perplexity
    assert summary["tokens_per_second"] == result.tokens_per_second
    assert summary["peak_memory_mb"] == result.peak_memory_mb
    assert exits == [0]
    tables = [
        json.loads(path.read_text()) for path in (tmp_path / "run").rglob("offline-run-*/**/*.table.json")
    ]
    assert tables[0]["columns"] == ["origin", "prompt", "answer", "expected", "score"]
    assert [row[0] for row in tables[0]["data"]] == [f"{folder}/held.jsonl:{line}" for line in (1, 2)]
    written = capfd.readouterr()
    assert written.err == ""
    assert written.out.startswith("wandb     offline · wandb sync ")
    assert len(written.out.strip().splitlines()) == 1


def test_no_secret_leaves_the_machine(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["luthier", "data.path=s3://me:hunter2@host/x"])
    trained(folder, tmp_path / "run", "trackers.wandb.tags=['https://me:hunter2@host/x']")
    config = story(tmp_path / "run")[0]
    assert config["trackers"]["wandb"]["tags"] == ["https://(hidden)@host/x"]
    (path,) = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    # The tag itself is what a person asked to be sent.
    assert path.read_bytes().count(b"hunter2") == 1


def test_a_run_that_fails_ends_as_failed(folder, tmp_path, monkeypatch):
    from luthier.engine import loop as engine

    def failing(number, error):
        calls = itertools.count(1)
        return lambda *arguments: fail(error) if next(calls) == number else whole(*arguments)

    def fail(error):
        raise error

    whole = engine.normalise
    for number, error, code in ((2, OSError, 1), (3, KeyboardInterrupt, 255)):
        monkeypatch.setattr(engine, "normalise", failing(number, error))
        with pytest.raises(error):
            trained(folder, tmp_path / str(number))
        _, history, _, exits, _ = story(tmp_path / str(number))
        assert exits == [code]
        assert max(line["step"] for line in history) == number - 1


def test_a_run_that_never_began_is_no_run(folder, tmp_path):
    with pytest.raises(ConfigError, match="there is no such file"):
        trained(folder, tmp_path / "run", "data.path=nowhere.jsonl")
    assert not (tmp_path / "run").exists()


def test_a_run_folder_keeps_the_id_and_a_resumed_run_goes_on_under_it(folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ID_FILE).write_text("abcd1234")
    trained(folder, tmp_path / "run")
    assert story(tmp_path / "run")[4].run_id == "abcd1234"
    trained(folder, tmp_path / "new")
    assert story(tmp_path / "new")[4].run_id == (tmp_path / "new" / ID_FILE).read_text()


@pytest.mark.parametrize(
    ("run_dir", "environment", "name", "group"),
    [
        ("multirun_a/0", {}, "multirun_a/0", "multirun_a"),
        ("multirun_a/11", {"WANDB_RUN_GROUP": "mine"}, "multirun_a/11", "mine"),
        ("multirun_a/seven", {}, "multirun_a/seven", "multirun_a"),
        ("runs/first", {}, "first", ""),
        ("runs/2026", {}, "2026", ""),
    ],
)
def test_jobs_of_a_multirun_are_a_group(folder, tmp_path, monkeypatch, run_dir, environment, name, group):
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    if "multirun" in run_dir:
        write_status(tmp_path / run_dir, ["seed=1"], "running")
    trained(folder, tmp_path / run_dir, "max_steps=1")
    run = story(tmp_path / run_dir)[4]
    assert (run.display_name, run.run_group) == (name, group)


def test_an_evaluation_by_itself_is_a_run_too(folder, tmp_path):
    more = [f"data.path={folder}/held.jsonl", "evaluation.max_new_tokens=3"]
    report = evaluate(compose("evaluate", overrides(folder, tmp_path / "run", *more)))
    _, history, summary, exits, _ = story(tmp_path / "run")
    assert [line["held_out/loss"] for line in history] == [report.loss]
    assert summary["perplexity"] == report.perplexity
    assert exits == [0]


def test_without_an_account_a_run_ends_before_anything_is_loaded(folder, tmp_path):
    with pytest.raises(ConfigError, match="nobody is logged in; run `wandb login`") as caught:
        trained(folder, tmp_path / "run", "trackers.wandb.mode=online", "model.path=./never_looked_at")
    assert "\n" not in str(caught.value)


def test_without_the_package_one_line_says_what_to_install(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb is not installed; pip install wandb"):
        trained(folder, tmp_path / "run", "model.path=./never_looked_at")


def test_what_wandb_refuses_is_one_line(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"tracker=wandb: .*; or set trackers.wandb.mode=offline") as caught:
        trained(folder, tmp_path / "run", "trackers.wandb.project='a/b'")
    assert "\n" not in str(caught.value)


def test_disabled_it_does_nothing(folder, tmp_path):
    trained(folder, tmp_path / "run", "trackers.wandb.mode=disabled")
    assert not list((tmp_path / "run").glob("wandb*"))
