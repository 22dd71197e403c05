"""Pictures for a run folder, by matplotlib, without a display."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def figure(file: Path, x: str, y: str) -> Iterator[Any]:
    """Yield the axes of a plot with these labels, and write it to `file`, PNG or SVG by its ending."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.add_subplot(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    yield axes
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(file, dpi=150)
