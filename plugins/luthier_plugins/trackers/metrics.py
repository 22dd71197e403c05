"""The metrics file: one JSON line a logging point, one an evaluation, on disk when the call returns."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import DictConfig

from luthier import EvaluationReport, Register, StepReport, Tracker, hookimpl

STEPS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"


@dataclass
class _Place:
    folder: Path = field(default_factory=Path)


@dataclass(frozen=True)
class MetricsFile(Tracker):
    """``metrics.jsonl`` and ``evaluations.jsonl`` in the run folder."""

    source: ClassVar[str] = "https://jsonlines.org"

    _place: _Place = field(default_factory=_Place, init=False, repr=False, compare=False)

    @hookimpl
    def after_config_composed(self, config: DictConfig) -> None:
        """Remember the run folder: an evaluation comes before the first step."""
        self._place.folder = Path(config.run_dir)

    @hookimpl
    def before_train(self, start_step: int) -> None:
        """Drop what a killed run wrote after the checkpoint that is resumed, or all if there was none."""
        for name in (STEPS, EVALUATIONS):
            _filter(self._place.folder / name, lambda step: step <= start_step)

    @hookimpl
    def after_step(self, report: StepReport) -> None:
        """Append a line to ``metrics.jsonl``."""
        _append(self._place.folder / STEPS, dataclasses.asdict(report))

    @hookimpl
    def after_evaluation(self, report: EvaluationReport) -> None:
        """Append a line to ``evaluations.jsonl``; it takes the place of an earlier one of the same step."""
        _filter(self._place.folder / EVALUATIONS, lambda step: step != report.step)
        _append(self._place.folder / EVALUATIONS, dataclasses.asdict(report))


def _append(path: Path, record: dict[str, Any]) -> None:
    line = json.dumps(record, ensure_ascii=False, default=str).encode() + b"\n"
    with path.open("a+b") as file:
        # A run that was killed may have left half a line, which must not swallow this one.
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)


def _filter(path: Path, keeps: Callable[[float], bool]) -> None:
    """Keep the whole lines of the steps that `keeps` names; the file is replaced at once or not at all."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    # A run that starts anew was evaluated again before its first step: the newest line of a step counts.
    newest = {_step(line): line for line in lines}
    kept = [line for step, line in newest.items() if keeps(step) and step < math.inf]
    if kept != lines:
        draft = path.with_name(path.name + ".part")
        draft.write_bytes(b"".join(kept))
        draft.replace(path)


def _step(line: bytes) -> float:
    """Return the step of a line; of half a line, one that is never kept."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


@hookimpl
def register_trackers(register: Register) -> None:
    """Register `metrics`."""
    register("metrics", MetricsFile)
