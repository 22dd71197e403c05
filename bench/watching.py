"""A command run and its memory watched; the disk measured beside it. Linux only: it reads ``/proc``."""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

EVERY = 0.01
"""Seconds between two looks."""
_BLOCK = 1 << 24


@dataclass(frozen=True)
class Watched:
    """A command that ended well; memory is the most that its processes had together.

    Attributes:
        seconds: From its start to its end, imports included.
        sync_seconds: Until the disk had what it wrote, afterwards.
        anonymous_mb: Memory that no file stands behind (``RssAnon``), MB.
        resident_mb: All of it, mapped files included (``VmRSS``), MB.
    """

    seconds: float
    sync_seconds: float
    anonymous_mb: float
    resident_mb: float


def watch(command: Sequence[str], folder: Path, env: Mapping[str, str]) -> Watched:
    """Run `command` in `folder` and return what it took.

    Raises:
        RuntimeError: It failed; the end of its output is told.
    """
    os.sync()
    anonymous = resident = 0
    with tempfile.TemporaryFile("w+") as output:
        began = time.perf_counter()
        child = subprocess.Popen(command, cwd=folder, env=dict(env), stdout=output, stderr=output)
        while child.poll() is None:
            own = [_memory(process) for process in _family(child.pid)]
            anonymous = max(anonymous, sum(one.get("RssAnon", 0) for one in own))
            resident = max(resident, sum(one.get("VmRSS", 0) for one in own))
            time.sleep(EVERY)
        ended = time.perf_counter()
        if child.returncode:
            output.seek(0)
            raise RuntimeError("\n".join(output.read().splitlines()[-15:]))
    os.sync()
    synced = time.perf_counter()
    return Watched(ended - began, synced - ended, anonymous * 1024 / 1e6, resident * 1024 / 1e6)


def _family(process: int) -> Iterator[int]:
    """Yield a process and all that it started; nothing once it has ended."""
    yield process
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children = file.read_text().split()
        except OSError:
            continue
        for child in children:
            yield from _family(int(child))


def _memory(process: int) -> dict[str, int]:
    """Return the sizes that ``/proc`` tells of a process, kB; none once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key: int(rest.split()[0]) for key, _, rest in pairs if rest.endswith(" kB")}


def forget(files: Iterable[Path]) -> None:
    """Let the system drop what it holds of `files`, so that they are read from the disk again."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@dataclass(frozen=True)
class Disk:
    """Sequential speeds of a disk, bytes a second."""

    read: float
    write: float

    def seconds(self, read: int, written: int) -> float:
        """Return what so many bytes take at least."""
        return read / self.read + written / self.write


def measure_disk(folder: Path, size: int) -> Disk:
    """Write and read a file of `size` bytes in `folder`, past what the system holds in memory."""
    file, block = folder / "disk", os.urandom(_BLOCK)
    began = time.perf_counter()
    with file.open("wb", buffering=0) as there:
        for _ in range(size // _BLOCK):
            there.write(block)
        os.fsync(there.fileno())
    written = time.perf_counter()
    forget([file])
    start = time.perf_counter()
    with file.open("rb", buffering=0) as there:
        while there.read(_BLOCK):
            pass
    ended = time.perf_counter()
    file.unlink()
    return Disk(read=size / (ended - start), write=size / (written - began))
