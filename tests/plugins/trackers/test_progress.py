"""What a person sees: header, lines, samples before and after, where the result is."""

import io
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from luthier import EvaluationReport, Sample, StepReport, TrainResult
from luthier_plugins.trackers.progress.progress import ProgressBar

CONFIG = OmegaConf.create({"evaluation": {"samples": 1}, "adapter": {"name": "lora"}})


def step(number: int) -> StepReport:
    return StepReport(
        step=number, total_steps=4, epoch=0.5, loss=1.25, metrics={"margin": 0.5}, learning_rate=1e-3,
        grad_norm=1.0, tokens=100, tokens_per_second=1234.0, memory_mb=2048.0, seconds=2.0 * number,
    )  # fmt: skip


def evaluation(number: int, accuracy: float | None, answer: str) -> EvaluationReport:
    samples = [Sample("x:1", "2 + [2]", answer, "4", 0.0), Sample("x:2", "second", "no", "yes", 0.0)]
    return EvaluationReport(number, 2.0, 7.4, accuracy, rows=5, scored=2, samples=samples)


def result(before: EvaluationReport | None, after: EvaluationReport | None) -> TrainResult:
    return TrainResult(
        run_dir=Path("runs/x"), model_dir=Path("runs/x/model"), steps=4, first_loss=2.0, last_loss=1.0,
        before=before, after=after, trainable_parameters=1, total_parameters=2, tokens=100,
        tokens_per_second=50.0, seconds=8.0, peak_memory_mb=512.0, versions={},
    )  # fmt: skip


@pytest.fixture
def shown():
    """A tracker that writes to a buffer, and a function that returns what it wrote."""
    tracker, buffer = ProgressBar(), io.StringIO()
    tracker._screen.console = Console(file=buffer, width=200)
    tracker.after_config_composed(config=CONFIG)
    return tracker, buffer.getvalue


def test_a_line_a_logging_point_says_loss_speed_memory_and_time_left(shown):
    tracker, text = shown
    tracker.before_train(run_dir=Path("x"), config=CONFIG, total_steps=4, start_step=0)
    tracker.after_step(report=step(1))
    assert "step 1/4 · loss 1.2500 · margin 0.500 · lr 1.0e-03 · 1,234 tok/s · 2,048 MB · 6 s left" in text()


def test_a_terminal_gets_a_bar_that_is_gone_when_the_run_ends(shown):
    tracker, _ = shown
    buffer = io.StringIO()
    tracker._screen.console = Console(file=buffer, width=160, force_terminal=True)
    tracker.before_train(run_dir=Path("x"), config=CONFIG, total_steps=4, start_step=0)
    tracker.after_step(report=step(2))
    assert tracker._screen.bar.tasks[0].completed == 2
    tracker.on_train_error(error=KeyboardInterrupt())
    assert tracker._screen.bar is None
    assert "1,234 tok/s" in buffer.getvalue()


def test_a_resumed_run_says_where_it_starts_and_the_bar_stands_there(shown):
    tracker, text = shown
    tracker.before_train(run_dir=Path("x"), config=CONFIG, total_steps=4, start_step=3)
    assert text() == "resumed at step 3 of 4\n"
    buffer = io.StringIO()
    tracker._screen.console = Console(file=buffer, width=160, force_terminal=True)
    tracker.before_train(run_dir=Path("x"), config=CONFIG, total_steps=4, start_step=3)
    assert tracker._screen.bar.tasks[0].completed == 3
    before = buffer.getvalue()
    tracker.after_checkpoint_saved(folder=Path("x/checkpoints/step_4"))
    assert "step_4" not in buffer.getvalue()[len(before) :]
    tracker.on_train_error(error=KeyboardInterrupt())


def test_a_checkpoint_is_a_line_of_a_log(shown):
    tracker, text = shown
    tracker.after_checkpoint_saved(folder=Path("x/checkpoints/step_4"))
    assert text() == "checkpoint step_4\n"


def test_answers_are_shown_before_and_after_with_what_was_expected(shown):
    tracker, text = shown
    before, after = evaluation(0, 0.0, "I think\nit is 5"), evaluation(4, 0.5, "4")
    tracker.after_evaluation(report=before)
    tracker.after_evaluation(report=after)
    tracker.after_train(result=result(before, after))
    for line in (
        "held out, step 0: loss 2.0000, perplexity 7.40 · 0% of 2 right",
        "2 + [2]  (4)\n  before  I think it is 5\n  after   4",
        "exact match on 2 held-out problems: 0% before, 50% after",
        "4 steps in 8 s, 50 tok/s, peak 512 MB · result: runs/x/model",
    ):
        assert line in text()
    assert "second" not in text()


def test_an_evaluation_by_itself_shows_its_answers(shown):
    tracker, text = shown
    tracker.after_config_composed(config=OmegaConf.create({"evaluation": {"samples": 1}}))
    tracker.after_evaluation(report=evaluation(0, 0.5, "4"))
    assert text() == "held out: loss 2.0000, perplexity 7.40 · 50% of 2 right\n\n2 + [2]  (4)\n  answer  4\n"


def test_without_held_out_rows_only_the_result_is_shown(shown):
    tracker, text = shown
    tracker.after_train(result=result(None, None))
    assert text().strip().startswith("4 steps in 8 s")


def test_it_can_be_silent():
    tracker, buffer = ProgressBar(enabled=False), io.StringIO()
    tracker._screen.console = Console(file=buffer)
    tracker.after_header(lines=["model     m"])
    tracker.after_step(report=step(1))
    assert buffer.getvalue() == ""
