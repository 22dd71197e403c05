"""The runs of a multirun as a table on the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from luthier import hookimpl
from luthier.runs import STATUS, SUMMARY
from luthier_toolkits.terminal import counted, plain_console, plain_table, shown

COLUMNS = ("loss", "held-out loss", "reward", "preferences", "length preferred", "right", "tok/s", "peak MB")
"""What a table of runs shows, as far as the runs have it."""


@hookimpl
def after_multirun(runs: list[tuple[str, Path]]) -> None:
    """Print what the runs of a multirun measured, one row a run, from their ``summary.json``.

    What was measured before training too stands as *before → after*; a column that no run has is left out.

    Args:
        runs: The overrides that tell a run from the others, and its folder.
    """
    ends = [_read(folder / STATUS) for _, folder in runs]
    # What lies in the folder of a job that failed is of an earlier one, or half of a run.
    rows = [
        (folder, overrides, _measured(folder) if end.get("state") == "done" else {})
        for (overrides, folder), end in zip(runs, ends, strict=True)
    ]
    every = dict.fromkeys([*COLUMNS, *(name for _, _, values in rows for name in values)])
    named = [name for name in every if any(values.get(name, "–") != "–" for _, _, values in rows)]
    table = plain_table("", "run", *map(shown, named))
    for folder, overrides, values in rows:
        table.add_row(
            shown(folder.name),
            shown(overrides),
            *([values.get(name, "–") for name in named] if values else ["[red]failed[/]"]),
        )
    console = plain_console()
    console.print(
        f"\n[bold]{counted(len(runs), 'run')}[/] in {shown(_relative(runs[0][1].parent))}", highlight=False
    )
    console.print(table)
    for (folder, _, values), end in zip(rows, ends, strict=True):
        if not values:
            reason = end.get("error") or "it did not end; was it killed?"
            console.print(f"{shown(folder.name)} failed: {shown(reason)}", highlight=False)


def _measured(folder: Path) -> dict[str, str]:
    """Return the columns of a run; nothing of one that failed."""
    if not (summary := _read(folder / SUMMARY)):
        return {}
    before, after = summary.get("before") or {}, summary.get("after") or summary
    columns = {
        "loss": _number(summary.get("last_loss", summary.get("loss"))),
        "held-out loss": _number((summary.get("after") or {}).get("loss")),
        "right": _change(before.get("accuracy"), after.get("accuracy")),
        "tok/s": _number(summary.get("tokens_per_second"), ",.0f"),
        "peak MB": _number(summary.get("peak_memory_mb"), ",.0f"),
    }
    old, new = before.get("metrics") or {}, after.get("metrics") or {}
    columns["preferences"] = _change(_preferences(old), _preferences(new))
    columns["reward"] = _change(old.get("reward"), new.get("reward"), ".2f")
    columns["length preferred"] = _change(old.get("length/preferred"), new.get("length/preferred"), ".1f")
    return columns | {task: _number(score, ".0%") for task, score in (summary.get("scores") or {}).items()}


def _read(file: Path) -> dict[str, Any]:
    """Return the table in `file`; an empty one where there is none."""
    try:
        table: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return table


def _preferences(metrics: dict[str, float]) -> float | None:
    """Return the share of preferences that the policy has too: of pairs, or else of labels."""
    return metrics.get("pair_accuracy", metrics.get("label_accuracy"))


def _change(before: float | None, after: float | None, form: str = ".0%") -> str:
    return _number(after, form) if before is None else f"{_number(before, form)} → {_number(after, form)}"


def _number(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None else format(value, form)


def _relative(folder: Path) -> str:
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)
