"""The command line as a person uses it: real processes, exit status, one line for a mistake."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import forked
from helpers import save_tiny, write_rows
from luthier import compose, train
from luthier.commands.cli import _interrupted_afterwards, dispatch, report
from luthier.commands.launch import PRELOADED, _Jobs
from luthier.errors import LuthierError
from luthier.system import locked
from luthier_toolkits.terminal import SafeConsole

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    save_tiny(path / "base")
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(16)]
    write_rows(path / "rows.jsonl", rows)
    return path


def luthier(folder, *arguments):
    return forked.luthier(*arguments, cwd=folder, env={**os.environ, "COLUMNS": "200"})


TINY = ["model.path=base", "data=jsonl", "data.path=rows.jsonl", "batch_size=8", "model.dtype=float32"]


def test_a_multirun_leaves_a_folder_and_a_row_of_the_table_for_every_combination(folder):
    # users.md row 40: jobs that share a process or a folder.
    done = luthier(
        folder, "train", "-m", *TINY, "max_steps=2", "adapter=lora,full", "optimiser.lr=1e-4,3e-4",
        "hydra.sweep.dir=sweep",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summaries = sorted(folder.glob("sweep/*/summary.json"))
    assert [path.parent.name for path in summaries] == ["0", "1", "2", "3"]
    trained = [json.loads(path.read_text())["trainable_parameters"] for path in summaries]
    assert trained[0] == trained[1] < trained[2] == trained[3]
    for row in ("adapter=lora optimiser.lr=0.0001", "adapter=full optimiser.lr=0.0003"):
        assert row in done.stdout


def test_a_failed_job_does_not_stop_the_others_and_shows_in_the_table(folder):
    # By the interpreter itself: its jobs are spawned.
    command = [sys.executable, "-m", "luthier", "train", *TINY, "-m", "max_steps=1"]
    command += ["data.path=nowhere.jsonl,rows.jsonl", "hydra.sweep.dir=half"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1
    assert "nowhere.jsonl: there is no such file" in done.stderr
    assert (folder / "half" / "1" / "summary.json").exists()
    assert "failed" in done.stdout


def test_a14_a_refused_job_shows_no_figures_of_the_run_whose_folder_it_asked_for(folder):
    # hydra#1407: the second multirun is refused job by job, and its table had the first one's losses.
    sweep = ["train", "-m", *TINY, "max_steps=1", "seed=0,1", "hydra.sweep.dir=twice"]
    assert luthier(folder, *sweep).returncode == 0
    before = {path: path.read_bytes() for path in (folder / "twice").rglob("summary.json")}
    again = luthier(folder, *sweep, "optimiser.lr=1.0")
    assert again.returncode == 1
    assert again.stdout.count("failed: run_dir=") == 2, again.stdout
    assert "tok/s" not in again.stdout
    assert before == {path: path.read_bytes() for path in before}
    statuses = [json.loads((folder / "twice" / job / "status.json").read_text()) for job in "01"]
    assert [status["state"] for status in statuses] == ["failed", "failed"]
    assert statuses[1]["overrides"][-1] == "optimiser.lr=1.0"
    # The same one, gone on with, is done and shows what it measured.
    done = luthier(folder, *sweep, "resume=auto")
    assert (done.returncode, "tok/s" in done.stdout) == (0, True), done.stderr


def test_a14_runs_that_start_in_one_second_have_folders_of_their_own(folder):
    # hydra#1607; named by the hour here, so that they surely meet.
    words = ["train", *TINY, "max_steps=1", "run_dir=clock/${now:%Y-%m-%d_%H}"]
    commands = [forked.Command(words, cwd=folder) for _ in range(2)]
    ends = [command.communicate() for command in commands]
    assert [command.returncode for command in commands] == [0, 0], ends
    first, second = sorted(path.parent.name for path in (folder / "clock").rglob("summary.json"))
    assert second == f"{first}-2"


def test_a14_multiruns_that_start_in_one_second_have_folders_of_their_own(folder):
    words = ["train", *TINY, "-m", "max_steps=1", "run_dir=clocks/${now:%Y-%m-%d_%H}"]
    commands = [forked.Command(words, cwd=folder) for _ in range(2)]
    ends = [command.communicate() for command in commands]
    assert [command.returncode for command in commands] == [0, 0], ends
    first, second = sorted(path.parents[1].name for path in (folder / "clocks").rglob("summary.json"))
    assert second == f"{first}-2"
    assert json.loads((folder / "clocks" / first / "0" / "status.json").read_text())["state"] == "done"


def test_a14_a_busy_folder_of_a_multirun_stays_as_it_is(folder):
    (folder / "busy").mkdir()
    (folder / "busy" / "multirun.yaml").write_text("of the first one")
    for word in ("run_dir=busy", "hydra.sweep.dir=busy"):
        with locked(folder / "busy"):
            done = luthier(folder, "train", *TINY, "-m", "seed=0,1", word)
        assert done.returncode == 2
        assert done.stderr.endswith(
            "busy is in use by a run that has not ended; wait for it, or choose another\n"
        )
        assert [path.name for path in (folder / "busy").iterdir()] == ["multirun.yaml"]
        assert (folder / "busy" / "multirun.yaml").read_text() == "of the first one"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["seed=0,1", "hydra.sweep.subdir=same"], "same would be that of two runs; hydra.sweep.subdir must"),
        (["seed=glob(*)"], "-m has nothing to run: no value in "),
        (["seed=0,1", "run_dir="], "run_dir= names no folder"),
        (["seed=0,1", "run_dir=rows.jsonl"], "rows.jsonl cannot be written: File exists"),
        (["seed=0,1", "hydra.sweep.dir=rows.jsonl/x"], "rows.jsonl/x cannot be written: Not a directory"),
        (["run_dir=one,other"], "run_dir=one,other: a multirun has one run_dir, with a folder for every run"),
    ],
)
def test_a14_no_two_jobs_share_a_folder_and_none_is_lost(folder, monkeypatch, words, told):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(_Jobs, "_in_own_process", lambda *_: 0)
    with pytest.raises(LuthierError, match=re.escape(told)) as error:
        dispatch(["train", *TINY, "-m", *words])
    assert error.value.status == 2
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("word", ["run_dir=~/1.10", "hydra.sweep.dir=~/1.10", "run_dir='~/1.10'"])
def test_e_a_tilde_is_the_home_folder_for_every_run(folder, tmp_path, monkeypatch, word):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(_Jobs, "_in_own_process", lambda *_: 0)
    assert dispatch(["train", *TINY, "-m", "seed=0,1", word]) == 0
    assert sorted(path.name for path in (tmp_path / "1.10").iterdir()) == ["0", "1", "multirun.yaml"]
    if word.startswith("run_dir"):
        config = compose("train", [*TINY, f"{word}-x".replace("'-x", "-x'"), "max_steps=1"])
        assert train(config).run_dir == tmp_path / "1.10-x"


def test_jobs_are_labelled_by_the_words_that_were_typed():
    jobs = _Jobs("merge")
    jobs.folders = [([f"++merger.weights.a={weight}", "merger=soup"], Path(str(weight))) for weight in (1, 2)]
    assert [label for label, _ in jobs.labelled()] == ["merger.weights.a=1", "merger.weights.a=2"]


def test_a_run_prints_what_it_does_and_where_the_result_is(folder):
    done = luthier(folder, "train", *TINY, "max_steps=2", "run_dir=shown")
    assert done.returncode == 0, done.stderr
    assert "16 rows" in done.stdout
    assert "step 2/2 · loss" in done.stdout
    assert "tok/s" in done.stdout
    assert "result: " in done.stdout
    assert (folder / "shown" / "model" / "adapter_model.safetensors").exists()


def test_a_result_is_evaluated_by_its_folder(folder):
    luthier(folder, "train", *TINY, "max_steps=1", "run_dir=trained")
    done = luthier(
        folder, "evaluate", "model.path=trained/model", "data=jsonl", "data.path=rows.jsonl",
        "run_dir=judged", "evaluation.max_new_tokens=2", "model.dtype=float32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "held out: loss" in done.stdout
    assert "of 16 right" in done.stdout
    assert "  answer  " in done.stdout
    assert json.loads((folder / "judged" / "summary.json").read_text())["rows"] == 16


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian"], "unknown command 'trian': did you mean 'train'?"),
        (["train", *TINY, "adapter.rnk=4"], "unknown option 'adapter.rnk': did you mean 'adapter.rank'?"),
        (["train", *TINY, "adapter=lroa"], "luthier: unknown adapter 'lroa': did you mean 'lora'?"),
        (["train", *TINY, "adapter=lora,full"], "adapter=lora,full: several values need -m"),
        (["train", *TINY, "data.path=nowhere.jsonl"], "nowhere.jsonl: there is no such file"),
        (["train", *TINY, "model.path=nowhere/base"], "nowhere/base"),
        (["train", *TINY, "batch_size=[", "max_steps=1"], "batch_size=["),
        (["train", *TINY, "batch_size=0"], "batch_size=0 must be positive"),
        (["train", *TINY, "run_dir=rows.jsonl/x"], "rows.jsonl/x cannot be written: Not a directory"),
        (["train", *TINY, f"model.path={'a' * 300}"], "File name too long"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(folder, arguments, told):
    done = luthier(folder, *arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_while_modules_are_imported_counts_afterwards():
    with (
        pytest.raises(KeyboardInterrupt),
        _interrupted_afterwards(),
        contextlib.suppress(KeyboardInterrupt),  # as a module might
    ):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_pressed_twice_counts_at_once():
    went_on = []

    def press_twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        went_on.append(True)

    with pytest.raises(KeyboardInterrupt), _interrupted_afterwards():
        press_twice()
    assert not went_on


def test_help_lists_groups_choices_and_options_with_their_defaults(folder, capsys):
    assert dispatch(["train", "adapter=lora", "--help"]) == 0
    text = capsys.readouterr().out
    for shown in (
        "adapter",
        "full, lora",
        "json, jsonl, mixture",
        "pack_tokens",
        "adapter.rank",
        "quickstart",
    ):
        assert shown in text
    assert dispatch(["--help"]) == 0
    assert "train" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--nope"], ["nope"], ["new", "merger"], ["new", "merger", "a", "b"]])
def test_a_mistake_under_plugins_is_one_line(arguments, capsys):
    assert report(lambda: dispatch(["plugins", *arguments])) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert errors.endswith("--help)\n")


def test_plugins_lists_and_loads(capsys):
    assert dispatch(["plugins"]) == 0
    assert "luthier_plugins.adapters.lora" in capsys.readouterr().out.replace("\n", "")
    assert dispatch(["plugins", "--load"]) == 0
    assert "broken" not in capsys.readouterr().out


def test_a_traceback_is_shown_only_when_asked(monkeypatch, capsys):
    def fail() -> int:
        raise LuthierError("what, where, how")

    assert report(fail) == 2
    assert capsys.readouterr().err == "luthier: what, where, how\n"
    monkeypatch.setenv("LUTHIER_TRACEBACK", "1")
    with pytest.raises(LuthierError):
        report(fail)


def test_what_jobs_of_a_multirun_share_leaves_the_gpu_alone():
    """A process forked after any of these was asked cannot use CUDA: torch refuses it."""
    code = f"""
import torch

def asked(*_, **__):
    raise AssertionError("the GPU was asked for")

for name in ("is_available", "device_count", "current_device", "get_device_capability", "get_device_name",
             "get_device_properties", "is_bf16_supported", "mem_get_info", "init", "_lazy_init"):
    setattr(torch.cuda, name, asked)
import {PRELOADED}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_closed_output_is_no_mistake(folder):
    program = [sys.executable, "-c", "from luthier.commands.cli import main; main(['help'])"]
    shell = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *program], capture_output=True, text=True, check=False
    )
    assert (shell.returncode, shell.stderr) == (0, "")


def test_a_pipe_that_nobody_reads_on_ends_no_run():
    ear, mouth = os.pipe()
    os.close(ear)
    with os.fdopen(mouth, "w") as stream:
        console = SafeConsole(file=stream)
        console.print("first")  # rich's own console would raise SystemExit
        console.print("second")


def test_d5_help_shows_names_of_ones_own_files_as_they_are(tmp_path, capsys):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "a\x1b]0;x\x07[red]b.yaml").write_text("# @package _global_\n# \x1b[31m Yes.\n")
    assert dispatch(["help", "train", "--config-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "a\\x1b]0;x\\x07[red]b" in said
    assert "\x1b" not in said
    assert "\x07" not in said
