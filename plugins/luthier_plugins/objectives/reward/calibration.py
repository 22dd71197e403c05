"""Whether a probability means what it says: pairs in bins of confidence, and correlations, from sums alone.

A metric is a mean over everything between two logging points, so what is no mean is made of several: their
names begin with ``raw/`` and are gone once `summarised`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from luthier_toolkits.plots import figure

RAW = "raw/"
BINS = 5
"""Bins of confidence between a half and one."""
_EDGES = [0.5 + 0.5 * edge / BINS for edge in range(BINS + 1)]
_MIDDLES = {
    f"{100 * low:.0f}–{100 * high:.0f} %": (low + high) / 2 for low, high in itertools.pairwise(_EDGES)
}
"""The bins by name, with the confidence in their middle."""


@torch.no_grad()
def calibration_metrics(margins: Tensor) -> dict[str, tuple[Tensor, float]]:
    """Return how often the side that is preferred with a confidence is the right one, bin by bin.

    Args:
        margins: (n,) log-odds that the chosen side is the better one; its confidence is σ(|margin|).
    """
    confidence, right = torch.sigmoid(margins.abs()), 0.5 + 0.5 * margins.sign()
    places = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    count, metrics = float(len(margins)), {}
    for place, name in enumerate(_MIDDLES):
        inside = (places == place).to(margins.dtype)
        metrics[f"{RAW}share {name}"] = inside.sum(), count
        metrics[f"{RAW}right {name}"] = (right * inside).sum(), count
        metrics[f"{RAW}confidence {name}"] = (confidence * inside).sum(), count
    return metrics


@torch.no_grad()
def correlation_metrics(name: str, x: Tensor, y: Tensor) -> dict[str, tuple[Tensor, float]]:
    """Return the five means that the correlation of two quantities (n,), called `name`, is made of."""
    count = float(len(x))
    moments = {"x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}
    return {f"{RAW}{name} {key}": (value.sum(), count) for key, value in moments.items()}


def summarised(means: Mapping[str, float]) -> dict[str, float]:
    """Return `means` without the raw ones, with what is made of them."""
    raw = {name.removeprefix(RAW): value for name, value in means.items() if name.startswith(RAW)}
    metrics = {name: value for name, value in means.items() if not name.startswith(RAW)}
    for name in [key.removesuffix(" xy") for key in raw if key.endswith(" xy")]:
        metrics[name] = _correlation(*(raw[f"{name} {key}"] for key in ("x", "y", "xx", "yy", "xy")))
    bins = [name for name in _MIDDLES if raw.get(f"share {name}")]
    if bins:
        gaps = (abs(raw[f"right {name}"] - raw[f"confidence {name}"]) for name in bins)
        metrics["calibration_error"] = sum(gaps)
    for name in bins:
        metrics[f"calibration/{name}"] = raw[f"right {name}"] / raw[f"share {name}"]
    return metrics


def _correlation(x: float, y: float, xx: float, yy: float, xy: float) -> float:
    spread = max(xx - x * x, 0.0) * max(yy - y * y, 0.0)
    return (xy - x * y) / math.sqrt(spread) if spread > 0 else 0.0


def draw_calibration(metrics: Mapping[str, float], file: Path) -> None:
    """Draw the share of right preferences against the confidence; nothing where there are none."""
    shares = {middle: metrics.get(f"calibration/{name}") for name, middle in _MIDDLES.items()}
    known = {middle: share for middle, share in shares.items() if share is not None}
    if not known:
        return
    with figure(file, "confidence that the preferred side is better", "share of pairs where it is") as axes:
        axes.plot([0.5, 1], [0.5, 1], color="0.7", linestyle="--", label="calibrated")
        axes.plot(list(known), list(known.values()), marker="o", label="reward model")
        axes.set_xlim(0.5, 1)
        axes.set_ylim(0, 1.02)
        axes.legend(frameon=False)
