"""The metrics file: lines on disk at once, and none twice after a run was killed and resumed."""

import json

import pytest
from omegaconf import OmegaConf

from luthier import EvaluationReport, Sample, StepReport
from luthier_plugins.trackers.metrics import MetricsFile


def step(number: int) -> StepReport:
    return StepReport(
        step=number, total_steps=9, epoch=0.5, loss=1.25, metrics={"margin": 0.5}, learning_rate=1e-3,
        grad_norm=1.0, tokens=100, tokens_per_second=50.0, memory_mb=2.0, seconds=2.0,
    )  # fmt: skip


def evaluation(number: int) -> EvaluationReport:
    return EvaluationReport(
        number, 2.0, 7.4, 0.5, rows=1, scored=1, samples=[Sample("x:1", "é", "4", "4", 1.0)]
    )


@pytest.fixture
def tracker(tmp_path):
    tracker = MetricsFile()
    tracker.after_config_composed(config=OmegaConf.create({"run_dir": str(tmp_path)}))
    return tracker


def steps(folder, name="metrics.jsonl"):
    return [
        json.loads(line)["step"] for line in (folder / name).read_text(encoding="utf-8").splitlines() if line
    ]


def test_nothing_is_written_before_something_is_measured(tracker, tmp_path):
    tracker.before_train(start_step=0)
    tracker.before_train(start_step=3)
    assert list(tmp_path.iterdir()) == []


def test_a_line_is_on_disk_when_the_call_returns(tracker, tmp_path):
    tracker.after_evaluation(report=evaluation(0))
    tracker.before_train(start_step=0)
    tracker.after_step(report=step(1))
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (line["step"], line["loss"], line["metrics"]) == (1, 1.25, {"margin": 0.5})
    found = json.loads((tmp_path / "evaluations.jsonl").read_text(encoding="utf-8"))
    assert found["samples"] == [
        {"origin": "x:1", "prompt": "é", "answer": "4", "expected": "4", "score": 1.0}
    ]


def test_a_resumed_run_drops_what_was_written_after_its_checkpoint(tracker, tmp_path):
    for number in (1, 2, 3, 4):
        tracker.after_step(report=step(number))
        tracker.after_evaluation(report=evaluation(number))
    tracker.before_train(start_step=2)
    assert steps(tmp_path) == steps(tmp_path, "evaluations.jsonl") == [1, 2]
    tracker.after_step(report=step(3))
    assert steps(tmp_path) == [1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluations.jsonl", "metrics.jsonl"]


def test_half_a_line_of_a_killed_run_is_dropped_and_swallows_nothing(tracker, tmp_path):
    tracker.after_step(report=step(1))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "loss": 1.\xc3')
    (tmp_path / "evaluations.jsonl").write_bytes(b'{"step": 1, "lo')
    # The first evaluation of a resumed run comes before its first step.
    tracker.after_evaluation(report=evaluation(1))
    tracker.before_train(start_step=1)
    tracker.after_step(report=step(2))
    assert steps(tmp_path) == [1, 2]
    assert steps(tmp_path, "evaluations.jsonl") == [1]


def test_a_whole_last_line_without_its_end_is_kept(tracker, tmp_path):
    tracker.after_step(report=step(1))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().rstrip())
    tracker.before_train(start_step=1)
    tracker.after_step(report=step(2))
    assert steps(tmp_path) == [1, 2]
