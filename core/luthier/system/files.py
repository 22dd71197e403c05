"""Folders that are written whole or not at all, hashes of files, tables in JSON."""

import contextlib
import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier.errors import ModelError


@contextlib.contextmanager
def written_whole(folder: Path, keep_existing: bool = False) -> Iterator[Path]:
    """Yield an empty sibling of `folder` that takes its place when the block ends without an error.

    Args:
        folder: What the result is called. What it held before is replaced.
        keep_existing: If `folder` has appeared meanwhile (another process was faster), keep that one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    fresh, old = (folder.with_name(f".{folder.name}.{mark}.{part}") for part in ("new", "old"))
    fresh.mkdir()
    try:
        yield fresh
        if not (keep_existing and folder.exists()):
            if folder.exists():
                folder.rename(old)
            _rename(fresh, folder, keep_existing)
    finally:
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _rename(fresh: Path, folder: Path, keep_existing: bool) -> None:
    try:
        fresh.rename(folder)
    except OSError:
        if not (keep_existing and folder.exists()):
            raise


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
