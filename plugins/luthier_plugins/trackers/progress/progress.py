"""Progress on the terminal: a header; a bar with loss, speed, memory and time left; answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from omegaconf import DictConfig

from luthier import EvaluationReport, Register, Sample, StepReport, Tracker, TrainResult, hookimpl, option
from luthier_plugins.trackers.progress.metric_text import grouped_metrics, plain_metrics
from luthier_plugins.trackers.progress.screen import Screen
from luthier_toolkits.terminal import counted, shown


@dataclass
class _Screen(Screen):
    samples: int = 3
    training: bool = True


@dataclass(frozen=True)
class ProgressBar(Tracker):
    """A bar on a terminal, a line a logging point elsewhere."""

    source: ClassVar[str] = "https://rich.readthedocs.io"

    enabled: bool = option(True, "Print anything at all.")
    _screen: _Screen = field(default_factory=_Screen, init=False, repr=False, compare=False)

    @hookimpl
    def after_config_composed(self, config: DictConfig) -> None:
        """Remember how many answers to show, and whether training stands between two showings."""
        self._screen.samples = config.evaluation.samples
        self._screen.training = "adapter" in config

    @hookimpl
    def while_measuring(self, what: str, done: int, total: int) -> None:
        """Show how far it is, on a terminal, and that it is done."""
        screen = self._screen
        if self.enabled and screen.bar is None:
            screen.start(what, total, transient=True)
        screen.move(done)
        if done == total:
            screen.stop()
            self._print(f"[bold]{what:<10}[/]{total:,} completion{'s' * (total != 1)} measured")

    @hookimpl
    def after_header(self, lines: list[str]) -> None:
        """Print what will run."""
        self._print("\n".join(f"[bold]{shown(line[:9])}[/]{shown(line[9:])}" for line in lines) + "\n")

    @hookimpl
    def before_train(self, run_dir: Path, config: DictConfig, total_steps: int, start_step: int) -> None:
        """Start the bar where the run starts."""
        if start_step:
            self._print(f"resumed at step {start_step} of {total_steps}")
        if self.enabled:
            self._screen.start("train", total_steps, start_step)

    @hookimpl
    def after_step(self, report: StepReport) -> None:
        """Move the bar, or print a line."""
        extra = plain_metrics(report.metrics)
        text = (
            f"loss {report.loss:.4f}{extra} · lr {report.learning_rate:.1e} · "
            f"{report.tokens_per_second:,.0f} tok/s · {report.memory_mb:,.0f} MB"
        )
        if not self._screen.move(report.step, text):
            left = report.seconds / report.step * (report.total_steps - report.step)
            self._print(f"step {report.step}/{report.total_steps} · {text} · {left:,.0f} s left")

    @hookimpl
    def after_evaluation(self, report: EvaluationReport) -> None:
        """Print held-out quality."""
        if (screen := self._screen).full:  # the last step's evaluation comes after it
            screen.stop()
        metrics = plain_metrics(report.metrics)
        accuracy = "" if report.accuracy is None else f" · {report.accuracy:.0%} of {report.scored} right"
        when = f", step {report.step}" if screen.training else ""
        perplexity = "" if report.perplexity is None else f", perplexity {report.perplexity:.2f}"
        self._print(f"held out{when}: loss {report.loss:.4f}{perplexity}{metrics}{accuracy}")
        if grouped := grouped_metrics(report.metrics):
            self._print(f"          [dim]{grouped}[/]")
        if not screen.training:
            for sample in report.samples[: screen.samples]:
                self._print(f"\n{_question(sample)}\n  answer  {shown(_short(sample.answer))}")

    @hookimpl
    def after_checkpoint_saved(self, folder: Path) -> None:
        """Leave a line in a log; a bar is not interrupted."""
        if not self._screen.bar:
            self._print(f"checkpoint {shown(folder.name)}")

    @hookimpl
    def after_train(self, result: TrainResult) -> None:
        """Print answers before and after, and where the result is."""
        self._screen.stop()
        for old, new in self._pairs(result):
            answers = f"  before  {shown(_short(old.answer))}\n  after   {shown(_short(new.answer))}"
            self._print(f"\n{_question(new)}\n{answers}")
        if result.before and result.after and result.before.accuracy is not None:
            self._print(
                f"\n[bold]exact match on {result.after.scored} held-out problems: "
                f"{result.before.accuracy:.0%} before, {result.after.accuracy:.0%} after[/]"
            )
        self._print(
            f"\n{counted(result.steps, 'step')} in {result.seconds:,.0f} s, "
            f"{result.tokens_per_second:,.0f} tok/s, peak {result.peak_memory_mb:,.0f} MB · "
            f"result: {shown(result.model_dir)}"
        )

    @hookimpl
    def on_train_error(self, error: BaseException) -> None:
        """Leave the terminal as it was."""
        self._screen.stop()

    def _pairs(self, result: TrainResult) -> list[tuple[Sample, Sample]]:
        if not (result.before and result.after):
            return []
        return list(zip(result.before.samples, result.after.samples, strict=True))[: self._screen.samples]

    def _print(self, text: str) -> None:
        if self.enabled:
            self._screen.console.print(text, highlight=False, soft_wrap=True)


def _question(sample: Sample) -> str:
    return f"[bold]{shown(sample.prompt)}[/]  [dim]({shown(sample.expected)})[/]"


def _short(text: str, width: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1]}…"


@hookimpl
def register_trackers(register: Register) -> None:
    """Register `progress`."""
    register("progress", ProgressBar)
