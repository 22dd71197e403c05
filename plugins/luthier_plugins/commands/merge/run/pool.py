"""Merges tensors on several threads, shows how far it is, and records what is on the disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

import torch
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from luthier.contracts import Merger
from luthier_plugins.commands.merge.io.journal import Journal
from luthier_plugins.commands.merge.io.shard_writer import ShardWriter
from luthier_plugins.commands.merge.run.tensor import MergedTensor, TensorJob, groups_of, merge_tensor
from luthier_toolkits.terminal import SafeConsole

_RECORD_EVERY = 1.0
"""Seconds between two moments at which what is done is made safe."""
_AHEAD = 32
"""Tensors that wait for a thread: as many as small ones take no longer than making others safe."""
_LARGE = 31 << 20
"""Bytes, never touched: glibc keeps twice the largest block that was freed, up to 32 MiB (mallopt(3))."""


def merge_all(
    jobs: Sequence[TensorJob],
    merger: Merger,
    keep: int,
    threads: int,
    writer: ShardWriter,
    journal: Journal,
) -> list[MergedTensor]:
    """Merge `jobs` and return what became of them, in their order; those of the journal are left out.

    Args:
        jobs: The tensors.
        merger: The method.
        keep: Elements up to which a tensor is read once and held.
        threads: Tensors that are merged at a time.
        writer: Where they go.
        journal: What is done.

    Raises:
        ModelError: An input has numbers that are not finite, or is cut off.
    """
    left = [job for job in jobs if job.name not in journal.done]
    _keep_freed_memory()
    with _one_thread_each(), _progress() as bar:
        statistics = None
        if merger.statistics_over == "model" and left:
            task = bar.add_task("statistics", total=None)
            statistics = merger.collect_statistics(groups_of(jobs, merger, keep))
            bar.remove_task(task)
        task = bar.add_task("merge", total=sum(job.bytes_read for job in left))
        _run(
            left,
            lambda job: merge_tensor(job, merger, statistics, keep, writer.write),
            threads,
            lambda job: bar.advance(task, job.bytes_read),
            lambda fresh: _record(fresh, writer, journal),
        )
    return [journal.done[job.name] for job in jobs]


def _run(
    left: Sequence[TensorJob],
    merge: Callable[[TensorJob], MergedTensor],
    threads: int,
    advance: Callable[[TensorJob], None],
    record: Callable[[Sequence[MergedTensor]], None],
) -> None:
    """Call `merge` on every job, several at a time; make safe now and then, and at the end, what is done."""
    # The largest first: the last ones then end together.
    queue = iter(sorted(left, key=lambda job: -job.count))
    fresh: list[MergedTensor] = []
    recorded = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        running: dict[Future[MergedTensor], TensorJob] = {}
        try:
            while True:
                # Their bytes are read ahead while the others are merged.
                for job in queue:
                    for model in job.readers:
                        model.checkpoint.expect(job.name)
                    running[pool.submit(merge, job)] = job
                    if len(running) >= threads + _AHEAD:
                        break
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    fresh.append(future.result())
                    advance(running.pop(future))
                if time.monotonic() - recorded > _RECORD_EVERY:
                    record(fresh)
                    fresh, recorded = [], time.monotonic()
        finally:
            pool.shutdown(cancel_futures=True)
            whole = [future for future in running if not future.cancelled() and future.exception() is None]
            record([*fresh, *(future.result() for future in whole)])


def _record(fresh: Sequence[MergedTensor], writer: ShardWriter, journal: Journal) -> None:
    writer.flush()
    journal.add(fresh)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let torch use one thread an operation: the tensors are what runs side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed for what comes next: giving every run back and asking anew takes longer.

    For the rest of the program it then holds up to 62 MiB of what was freed. Elsewhere without effect.
    """
    torch.empty(_LARGE, dtype=torch.uint8)


def _progress() -> Progress:
    console = SafeConsole()
    return Progress(
        TextColumn("[bold]{task.description}[/]"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
