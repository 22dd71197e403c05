"""Stopping from outside: what a multirun or a stage runs is stopped too, saves first, and nothing is left."""

import json
import os
import pty
import signal
import sys
import time

import pytest

from forked import Command
from helpers import save_tiny, write_rows
from luthier.runs.signals import _handled, supervised
from luthier.system import locked

pytestmark = pytest.mark.slow
TINY = ["model.path=base", "data=jsonl", "data.path=rows.jsonl", "batch_size=2", "model.dtype=float32"]
LONG = [*TINY, "max_steps=1000000", "checkpoint.every=5", "log_every=10"]
NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "SIGINT", signal.SIGHUP: "SIGHUP"}


@pytest.fixture
def folder(tmp_path):
    save_tiny(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{a} then", "completion": a} for a in "abcd"])
    return tmp_path


def wait_for(path, ended):
    patience = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < patience
        assert not ended(), f"ended without {path}"
        time.sleep(0.02)


def assert_stopped(folder, job):
    """The job saved, said so, and holds its folder no longer."""
    status = json.loads((folder / job / "status.json").read_text())
    assert status["state"] == "failed"
    assert "stopped by SIGTERM after step" in status["error"] or "stopped by SIGHUP" in status["error"]
    step = int(status["error"].partition("after step ")[2].partition(";")[0])
    assert (folder / job / "checkpoints" / f"step-{step:08d}" / "manifest.json").exists()
    with locked(folder / job):
        pass


@pytest.mark.parametrize("number", NAMES)
def test_e_a_signal_to_a_multirun_stops_its_job_and_begins_no_other(folder, number):
    words = ["train", "-m", *LONG, "seed=0,1", "hydra.sweep.dir=sweep"]
    parent = Command(words, cwd=folder)
    wait_for(folder / "sweep/0/checkpoints/step-00000005", lambda: parent.returncode is not None)
    parent.send_signal(number)
    _, said = parent.communicate()
    assert parent.returncode == 128 + number, said
    assert f"luthier: stopped by {NAMES[number]} in job 0 of the multirun; those after it were not" in said
    assert_stopped(folder, "sweep/0")
    assert not (folder / "sweep/1").exists() or not list((folder / "sweep/1").iterdir())


def test_e_a_multirun_that_is_killed_stops_its_job_which_saves(folder):
    parent = Command(["train", "-m", *LONG, "seed=0,1", "hydra.sweep.dir=sweep"], cwd=folder)
    wait_for(folder / "sweep/0/checkpoints/step-00000005", lambda: parent.returncode is not None)
    parent.kill()
    parent.communicate()
    patience = time.monotonic() + 120
    while json.loads((folder / "sweep/0/status.json").read_text())["state"] == "running":
        assert time.monotonic() < patience, "the job goes on"
        time.sleep(0.1)
    assert_stopped(folder, "sweep/0")


def test_e_a_signal_to_a_run_stops_its_stage(folder):
    stage = f"train {' '.join(LONG)} tracker=[] run_dir=first"
    parent = Command(["train", *TINY, f"stages.first='{stage}'", "run_dir=second"], cwd=folder)
    wait_for(folder / "first/checkpoints/step-00000005", lambda: parent.returncode is not None)
    parent.send_signal(signal.SIGTERM)
    _, said = parent.communicate()
    assert parent.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step" in said
    with locked(folder / "first"):
        pass


def test_e_closing_the_terminal_stops_a_multirun_and_its_job_saves(folder):
    process, terminal = pty.fork()
    if not process:
        os.chdir(folder)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup, and a test run under it, ignores
        words = [sys.executable, "-m", "luthier", "train", "-m", *LONG, "hydra.sweep.dir=sweep"]
        os.execv(sys.executable, words)
    os.set_blocking(terminal, False)

    def drained():
        try:
            os.read(terminal, 1 << 16)
        except BlockingIOError:
            return False
        return False

    wait_for(folder / "sweep/0/checkpoints/step-00000005", drained)
    os.close(terminal)
    patience = time.monotonic() + 120
    while not os.waitpid(process, os.WNOHANG)[0]:
        if time.monotonic() > patience:
            os.kill(process, signal.SIGTERM)
        time.sleep(0.1)
    assert_stopped(folder, "sweep/0")


def test_one_ctrl_c_that_comes_twice_is_one_and_the_same_again_is_another():
    acted = []
    with _handled(lambda number, again: acted.append((number, again))) as came:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # passed on by a parent
        signal.raise_signal(signal.SIGINT)
    assert acted == [(signal.SIGINT, False), (signal.SIGINT, True)]
    assert came == [signal.SIGINT, signal.SIGTERM, signal.SIGINT]


def test_what_is_ignored_stays_ignored_as_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _handled(lambda *_: None) as came:
            signal.raise_signal(signal.SIGHUP)
        assert came == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_while_a_process_starts_is_passed_on():
    class Process:
        pid = os.getpid()

    heard = []
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:

        def start():
            signal.raise_signal(signal.SIGINT)
            signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))  # of the process itself
            return Process()

        assert supervised(start, lambda process: 7) == (7, signal.SIGINT)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
