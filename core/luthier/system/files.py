"""Folders that are written whole or not at all, and what tells one file's contents from another's."""

import contextlib
import hashlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


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
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
