"""Folders that are written whole or not at all, and held; hashes of files, tables in JSON."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier.errors import ModelError


@contextlib.contextmanager
def written_whole(folder: Path, keep_existing: bool = False) -> Iterator[Path]:
    """Yield an empty sibling of `folder` that takes its place when the block ends without an error.

    It is held while it is written: `luthier.runs.remove_leftovers` removes those that killed processes left.

    Args:
        folder: What the result is called. What it held before is replaced.
        keep_existing: If `folder` has appeared meanwhile (another process was faster), keep that one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.new")
    old = fresh.with_suffix(".old")
    fresh.mkdir()
    try:
        with locked(fresh):
            yield fresh
            if folder.exists() and not keep_existing:
                folder.rename(old)
            try:
                fresh.rename(folder)
            except OSError:
                if not (keep_existing and folder.exists()):
                    raise
    finally:
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def locked(place: Path) -> Iterator[bool]:
    """Hold a folder or file for the block, whatever it is called meanwhile.

    Yields:
        Whether it is held: some network file systems have no locks.

    Raises:
        BlockingIOError: Another holds it.
    """
    descriptor = os.open(place, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            raise
        except OSError:
            held = False
        yield held
    finally:
        os.close(descriptor)


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of `file` in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_table(file: Path) -> dict[str, Any]:
    """Return the table of options that a file in JSON holds.

    Raises:
        ModelError: It holds none, or cannot be read.
    """
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} is damaged: {error}") from error
    if not isinstance(table, dict):
        raise ModelError(f"{file} is damaged: expected a table of options")
    return table
