"""From measurements to a table, a Markdown file and a JSON file."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.side_by_side import Outcome

COLUMNS = (
    "contender",
    "precision",
    "tok/s",
    "min–max",
    "ratio, by round",
    "peak RSS MB",
    "RSS ratio",
    "first loss",
    "mean loss",
)


@dataclass(frozen=True)
class Summary:
    """One contender in one precision; ratios are to the reference in the same precision.

    `speed_ratio` is the median, and `speed_ratios` the range, of the ratios within each round.
    """

    contender: str
    precision: str
    tokens_per_second: float
    tokens_per_second_range: tuple[float, float]
    speed_ratio: float
    speed_ratios: tuple[float, float]
    peak_rss_mb: float
    rss_ratio: float
    first_loss: float
    mean_loss: float

    def cells(self) -> tuple[str, ...]:
        """Return the row of the table, in the order of `COLUMNS`."""
        slowest, fastest = self.tokens_per_second_range
        lowest, highest = self.speed_ratios
        return (
            self.contender,
            self.precision,
            f"{self.tokens_per_second:.0f}",
            f"{slowest:.0f}–{fastest:.0f}",
            f"{self.speed_ratio:.2f}× ({lowest:.2f}–{highest:.2f})",
            f"{self.peak_rss_mb:.0f}",
            f"{self.rss_ratio:.2f}×",
            f"{self.first_loss:.6f}",
            f"{self.mean_loss:.4f}",
        )


def summarise(outcome: Outcome, contender: str, precision: str, reference: str) -> Summary:
    """Return medians over rounds, and ratios to the reference contender."""
    runs, others = outcome.of(contender, precision), outcome.of(reference, precision)
    speeds, memory = [m.tokens_per_second for m in runs], median(m.peak_rss_mb for m in runs)
    ratios = [a.tokens_per_second / b.tokens_per_second for a, b in zip(runs, others, strict=False)]
    return Summary(
        contender=contender,
        precision=precision,
        tokens_per_second=median(speeds),
        tokens_per_second_range=(min(speeds), max(speeds)),
        speed_ratio=median(ratios),
        speed_ratios=(min(ratios), max(ratios)),
        peak_rss_mb=memory,
        rss_ratio=memory / median(m.peak_rss_mb for m in others),
        first_loss=runs[0].first_loss,
        mean_loss=mean(runs[0].losses),
    )


def summarise_all(outcome: Outcome, reference: str) -> list[Summary]:
    """Return a summary of every contender and precision that was measured beside the reference."""
    cases = dict.fromkeys((m.contender, m.precision) for m in outcome.measurements)
    return [summarise(outcome, c, p, reference) for c, p in cases if outcome.of(reference, p)]


def loss_spread(outcome: Outcome, precision: str = "fp32", step: int = 0) -> float | None:
    """Return how far apart the contenders' losses of a step lie; None if fewer than two were measured."""
    runs = [m for m in outcome.measurements if m.precision == precision]
    if len({m.contender for m in runs}) <= 1:
        return None
    losses = [m.losses[step] for m in runs]
    return max(losses) - min(losses) if all(map(math.isfinite, losses)) else math.inf


def show(title: str, summaries: Sequence[Summary]) -> None:
    """Print the table."""
    table = Table(title=title)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:2] else "right", no_wrap=True)
    for summary in summaries:
        table.add_row(*summary.cells())
    Console(width=max(Console().width, 130)).print(table)


def markdown(title: str, notes: Sequence[str], summaries: Sequence[Summary]) -> str:
    """Return the table and its notes as Markdown."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *(summary.cells() for summary in summaries)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    table = f"{table}\n\n" if summaries else ""
    return f"# {title}\n\n{table}" + "".join(f"- {note}\n" for note in notes)


def write(
    stem: Path,
    title: str,
    facts: Mapping[str, str],
    outcome: Outcome,
    summaries: Sequence[Summary],
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write ``STEM.json`` (everything, `more` too) and ``STEM.md`` (the table)."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    whole = {
        "facts": dict(facts),
        "failures": outcome.failures,
        "summaries": [asdict(summary) for summary in summaries],
        "measurements": [asdict(measurement) for measurement in outcome.measurements],
        **(more or {}),
    }
    stem.with_name(stem.name + ".json").write_text(json.dumps(whole, indent=1) + "\n")
    notes = [f"{key}: {value}" for key, value in facts.items()]
    notes += [f"{contender} failed and was dropped" for contender in outcome.failures]
    stem.with_name(stem.name + ".md").write_text(markdown(title, notes, summaries))
