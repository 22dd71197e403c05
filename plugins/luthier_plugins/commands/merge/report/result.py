"""What `merge` returns and shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from luthier.errors import ConfigError
from luthier_plugins.commands.merge.run.tensor import MergedTensor
from luthier_toolkits.terminal import SafeConsole, counted, shown


@dataclass(frozen=True)
class MergeReport:
    """What `merge` returns, shows, and leaves as ``summary.json`` and ``model/merge.json``.

    Attributes:
        model_dir: Where the result is.
        merger: The method and its options.
        models: Label → where the model came from.
        base: Where the base came from; None without one.
        result: ``model`` or ``adapter``.
        tensors: What became of every tensor, or of every adapted layer.
        bytes_read: Of the models, once each, since the merge began or last went on.
        bytes_written: Of the result, since then.
        seconds: Of the merge, since then.
        notes: What a person should know.
        discarded: Share of the change's energy ‖Δ‖² that a rank cut away, by layer.
        left_out: Models that a greedy merge left out.
        scores: Held-out task → share right, or −loss where the source verifies nothing.
    """

    model_dir: Path
    merger: Mapping[str, Any]
    models: Mapping[str, str]
    base: str | None
    result: str
    tensors: tuple[MergedTensor, ...] = ()
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    discarded: Mapping[str, float] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def bytes_per_second(self) -> float:
        """Read and written."""
        return (self.bytes_read + self.bytes_written) / max(self.seconds, 1e-9)

    def mean(self, key: str) -> float | None:
        """Return the mean over the tensors of one of their numbers, or None."""
        values = [value for tensor in self.tensors if (value := getattr(tensor, key)) is not None]
        return sum(values) / len(values) if values else None


REPORT = "merge.json"
"""The report's file in the folder of the result."""


def options_of(config: DictConfig) -> dict[str, Any]:
    """Return the merger's name and options."""
    return dict(cast("dict[str, Any]", OmegaConf.to_container(config.merger)))


def finished_report(folder: Path, digest: str) -> MergeReport | None:
    """Return the report of the merge in `folder`; None where there is no result.

    Args:
        folder: Where the result would be.
        digest: What tells the merge from any other.

    Raises:
        ConfigError: The result there is another merge's.
    """
    if not folder.exists():
        return None
    try:
        content: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = {}
    if content.get("merge") != digest:
        raise ConfigError(f"{folder} holds another merge's result; choose another run_dir")
    own = {field.name: content[field.name] for field in fields(MergeReport) if field.name in content}
    own["tensors"] = tuple(MergedTensor(**tensor) for tensor in own["tensors"])
    return MergeReport(**{**own, "model_dir": folder, "notes": tuple(own["notes"])})


COLUMNS = {
    "change": "change",
    "conflicts": "signs in conflict",
    "rounding": "rounding of weight",
    "rounding_of_change": "rounding of change",
}


def show_merge(report: MergeReport, count: int = 5) -> None:
    """Print the tensors that changed most, the mean of all, the notes and where the result is."""
    console = SafeConsole()
    console.print(
        f"{counted(len(report.tensors), 'layer' if report.result == 'adapter' else 'tensor')} of "
        f"{shown(', '.join(report.models))} merged by {report.merger['name']}: "
        f"{report.bytes_read / 1e6:,.0f} MB read, {report.bytes_written / 1e6:,.0f} MB written in "
        f"{report.seconds:.1f} s, {report.bytes_per_second / 1e6:,.0f} MB/s",
        soft_wrap=True,
    )
    keys = [key for key in COLUMNS if report.mean(key)]
    if keys:
        console.print(_table(report, keys, count))
    else:
        console.print("nothing changed")
    if report.discarded:
        worst = max(report.discarded, key=lambda name: report.discarded[name])
        console.print(
            f"cut to the rank: {_percent(sum(report.discarded.values()) / len(report.discarded))} of the "
            f"change's energy on average, at most {_percent(report.discarded[worst])} ({shown(worst)})"
        )
    if report.left_out:
        console.print(f"left out, as the score would have dropped: {shown(', '.join(report.left_out))}")
    for note in report.notes:
        console.print(shown(note), soft_wrap=True)
    if report.scores:
        console.print(
            "held out: "
            + " · ".join(f"{shown(task)} {_score(score)}" for task, score in report.scores.items())
        )
    console.print(f"{report.result}: {shown(report.model_dir)}", soft_wrap=True)


def _table(report: MergeReport, keys: list[str], count: int) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("tensor", no_wrap=True)  # headers of numbers wrap instead
    for key in keys:
        table.add_column(COLUMNS[key], justify="right")
    for tensor in sorted(report.tensors, key=lambda tensor: -tensor.change)[:count]:
        table.add_row(shown(tensor.name), *(_percent(getattr(tensor, key)) for key in keys))
    mean = [_percent(report.mean(key)) for key in keys]
    table.add_row(f"mean of {len(report.tensors)}", *mean, style="bold")
    return table


def _score(value: float) -> str:
    return f"{value:.0%}" if value >= 0 else f"loss {-value:.4f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.3g} %"
