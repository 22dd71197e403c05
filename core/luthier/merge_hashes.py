"""SHA-256 of the models of a merge, worked out in the background from the moment that they are named."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

_BLOCK = 1 << 24
"""Bytes hashed at a time: many, as Python's lock must be waited for after each."""
_Key = tuple[Path, int, int]
_begun: dict[_Key, Future[str]] = {}


@contextlib.contextmanager
def hashing(files: Iterable[Path]) -> Iterator[None]:
    """Hash `files` beside the block, one after the other; what is not done at its end is given up."""
    stopped = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        own: dict[_Key, Future[str]] = {}
        for file in files:
            if (key := _key(file)) not in _begun:
                own[key] = _begun[key] = pool.submit(_digest, file, stopped)
        try:
            yield
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for key in own:
                del _begun[key]


def hashes_of(files: Sequence[Path], threads: int) -> dict[Path, str]:
    """Return the digest of every one of `files` in hexadecimal digits, waiting for those that are begun."""
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(files, pool.map(_hash, files), strict=True))


def named_files(overrides: Sequence[str]) -> list[Path]:
    """Return the weights in the folders that a command line gives as ``models`` and ``base``.

    A guess, made before anything of it is checked: what looks wrong is left out, and refused later.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    named: list[str] = []
    with contextlib.suppress(HydraException):
        for one in OverridesParser.create().parse_overrides(list(overrides)):
            if one.key_or_group in ("models", "base"):
                named += _places(one.value())
    folders = [folder for place in named for folder in (Path(place), Path(place, "model"))]
    return [file for folder in folders for file in sorted(folder.glob("model*.safetensors"))]


def _places(given: object) -> list[str]:
    if isinstance(given, Mapping):
        given = list(given.values())
    return [str(one) for one in given] if isinstance(given, list) else [str(given)]


def _hash(file: Path) -> str:
    begun = _begun.get(_key(file))
    return _digest(file, threading.Event()) if begun is None or begun.cancel() else begun.result()


def _key(file: Path) -> _Key:
    there = file.stat()
    return file.resolve(), there.st_size, there.st_mtime_ns


def _digest(file: Path, stopped: threading.Event) -> str:
    digest, block = hashlib.sha256(), bytearray(_BLOCK)
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            if stopped.is_set():
                raise CancelledError
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()
