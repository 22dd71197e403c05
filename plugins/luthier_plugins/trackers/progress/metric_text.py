"""Metrics as a line of text; a name with a stroke (``length/chosen``) belongs to a group."""

from __future__ import annotations

from collections.abc import Mapping


def plain_metrics(metrics: Mapping[str, float]) -> str:
    """Return the metrics that stand for themselves, each with `` · `` before it."""
    return "".join(f" · {_words(name)} {value:.3f}" for name, value in metrics.items() if "/" not in name)


def grouped_metrics(metrics: Mapping[str, float]) -> str:
    """Return the metrics of groups: ``length chosen 21.0, rejected 18.5 · rewards …``."""
    groups: dict[str, list[str]] = {}
    for name, value in metrics.items():
        group, stroke, of = name.partition("/")
        if stroke:
            groups.setdefault(group, []).append(f"{_words(of)} {value:,.{1 if abs(value) >= 10 else 3}f}")
    return " · ".join(f"{_words(group)} {', '.join(values)}" for group, values in groups.items())


def _words(name: str) -> str:
    return name.replace("_", " ")
