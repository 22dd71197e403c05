"""SHA-256 of the files that are merged, worked out beside the merge."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

from luthier.errors import ModelError

_BLOCK = 1 << 20
"""Bytes hashed at a time: few enough to stay in a core's cache."""
_Identity = tuple[int, int]


class FileHashes:
    """SHA-256 of files as they were when this was made, whatever takes their place afterwards.

    Args:
        files: Files of weights; they stay open until `close`.
    """

    def __init__(self, files: Iterable[Path] = ()) -> None:
        self._open = {file: os.open(file, os.O_RDONLY) for file in files}
        self._before = {file: os.fstat(descriptor) for file, descriptor in self._open.items()}
        self._begun: dict[Path, Future[str]] = {}

    def begin(
        self, pool: ThreadPoolExecutor, known: dict[_Identity, Future[str]], stopped: threading.Event
    ) -> None:
        """Let `pool` hash every file that is not `known`, until `stopped`."""
        for file, there in self._before.items():
            identity = there.st_dev, there.st_ino
            if identity not in known:
                known[identity] = pool.submit(_digest, self._open[file], stopped)
            self._begun[file] = known[identity]

    def result(self) -> dict[str, str]:
        """Return the digests in hexadecimal digits by the files' names, waiting for them.

        Raises:
            ModelError: A file was written to since this was made.
        """
        digests = {file.name: begun.result() for file, begun in self._begun.items()}
        for file, before in self._before.items():
            after = os.fstat(self._open[file])
            if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise ModelError(f"{file} was written to while it was merged; merge again")
        return digests

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open = {}


@contextlib.contextmanager
def hashing(models: Sequence[FileHashes]) -> Iterator[None]:
    """Hash all files beside the block, each once; what is not done when it ends is stopped."""
    stopped = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            known: dict[_Identity, Future[str]] = {}
            for hashes in models:
                hashes.begin(pool, known, stopped)
            yield
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            for hashes in models:
                hashes.close()


def _digest(descriptor: int, stopped: threading.Event) -> str:
    digest, block, place = hashlib.sha256(), bytearray(_BLOCK), 0
    while count := os.preadv(descriptor, [block], place):
        if stopped.is_set():
            raise CancelledError
        digest.update(memoryview(block)[:count])
        place += count
    return digest.hexdigest()
