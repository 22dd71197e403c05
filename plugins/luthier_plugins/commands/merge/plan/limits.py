"""What a merge takes, in memory and on the disk, against what it may have."""

from __future__ import annotations

import contextlib
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path

from luthier.contracts import Merger
from luthier.errors import ConfigError
from luthier_plugins.commands.merge.run.tensor import RUN, TensorJob

_BUFFERS = 10
"""Runs of elements besides those of the models that are in memory at a time."""
COMPANIONS = 32_000_000
"""Bytes of the disk for config, tokenizer, card and report."""


def room_for(
    jobs: Sequence[TensorJob], merger: Merger, max_memory: float, threads: int, in_use: float
) -> int:
    """Return up to how many elements a tensor is held whole, so that a merge stays within `max_memory` GiB.

    Raises:
        ConfigError: It cannot; the message says what it takes.
    """
    merged = [job for job in jobs if job.source is None]
    models = max((len(job.readers) for job in merged), default=1)
    working = 4 * RUN * (2 * models + _BUFFERS)
    if merger.statistics_over != "nothing":
        working += 4 * merger.workspace * models
    if merger.elementwise:
        whole = max((4 * job.count * (job.whole + 3) for job in merged if job.whole), default=0)
    else:
        whole = max((4 * job.count * (len(job.readers) + 3) for job in merged), default=0)
    needed = threads * (working + whole)
    free = max_memory * 2**30 - in_use
    if needed > free:
        raise ConfigError(
            f"max_memory={max_memory:g} GiB is too little: the program has {in_use / 2**30:.2f} GiB in use, "
            f"and merging these tensors takes {needed / 2**30:.2f} GiB on {threads} threads; set "
            f"max_memory={(in_use + needed) / 2**30 + 0.005:.2f}" + (", or threads=1" if threads > 1 else "")
        )
    return int((free - needed) / threads / (4 * (models + 1)))


def check_loading(total: int, max_memory: float, in_use: float) -> None:
    """Refuse to begin what `max_memory` GiB has no room to load at the end: `total` bytes of weights.

    Raises:
        ConfigError: It has not.
    """
    needed = (in_use + 1.2 * total) / 2**30
    if needed > max_memory:
        raise ConfigError(f"check=load takes max_memory={needed + 0.005:.2f}, not {max_memory:g} GiB")


def check_disk(folder: Path, total: int) -> None:
    """Refuse to begin what the disk has no room for; what lies in `folder` is written over.

    Args:
        folder: Where it will be.
        total: Bytes of its weights.

    Raises:
        ConfigError: There is too little room.
    """
    parent = folder
    while not parent.exists():
        parent = parent.parent
    with contextlib.suppress(OSError):
        total += COMPANIONS
        there = sum(512 * file.stat().st_blocks for file in folder.glob("*.safetensors"))
        free = shutil.disk_usage(parent).free
        if free < total - there:
            raise ConfigError(
                f"{folder}: the result takes {(total - there) / 1e9:.3f} GB and the disk has room for "
                f"{free / 1e9:.3f} GB; choose another run_dir, or make room"
            )


def anonymous_bytes() -> float:
    """Return the bytes of this process that no file stands behind; 0 where the system does not say."""
    try:
        _, resident, with_files, *_ = Path("/proc/self/statm").read_text(encoding="utf-8").split()
    except OSError:
        return 0.0
    return float(int(resident) - int(with_files)) * resource.getpagesize()
