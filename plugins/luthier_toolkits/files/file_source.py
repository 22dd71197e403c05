"""Sources that read one file: what all of them check, and which of them reads a file of a given name."""

from __future__ import annotations

import gzip
import itertools
import zlib
from abc import abstractmethod
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

from luthier.contracts import DataSource, Row, option
from luthier.errors import ConfigError, DataError


@dataclass(frozen=True)
class FileSource(DataSource):
    """Rows of one file. A subclass says how to `parse` it; path, limit and emptiness are checked here.

    Attributes:
        suffixes: Endings of the files it reads, by which a folder finds it.
        expects: What a file should hold, for messages.
    """

    suffixes: ClassVar[tuple[str, ...]] = ()
    expects: ClassVar[str] = "rows"

    path: str = option("???", "The file.")
    limit: int | None = option(None, "Read so many rows at most.")

    def __post_init__(self) -> None:
        """Refuse a limit that reads nothing."""
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit={self.limit} must be at least 1; null reads all rows")

    @abstractmethod
    def parse(self, path: Path) -> Iterator[Row]:
        """Yield the rows of the file at `path`, which exists; read no further than the row that is asked for.

        Raises:
            DataError: What is wrong with the file, and where.
        """

    def rows(self) -> Iterator[Row]:
        """Yield the file's rows in order.

        Raises:
            ConfigError: There is no such file, or it may not be read.
            DataError: The file is empty, or broken somewhere.
        """
        path = Path(self.path).expanduser()
        if not path.is_file():
            odd = "is a folder, expected a file" if path.is_dir() else "is a pipe or device, expected a file"
            what = odd if path.exists() else "there is no such file"
            raise ConfigError(f"path={path}: {what}")
        empty = True
        try:
            for row in itertools.islice(self.parse(path), self.limit):
                empty = False
                yield row
        # EOFError and zlib's: a compressed file that was cut off or is none.
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(f"path={path}: cannot be read: {error}") from error
        if empty:
            raise DataError(f"{path}: the file is empty; expected {self.expects}")


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file, compressed or not, with their numbers and line ends.

    Raises:
        DataError: A line is not UTF-8.
    """
    # Bytes, so that a line that is not UTF-8 is named; the first may carry a byte-order mark.
    with cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.removeprefix(BOM_UTF8).decode("utf-8")
            except UnicodeDecodeError as error:
                message = f"{path}:{number}: not UTF-8 at byte {error.start + 1}; save the file as UTF-8"
                raise DataError(message) from error


def without_nulls(value: Any) -> Any:
    """Return a cell of a table without the nulls inside it: keys that only other rows have."""
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def file_sources() -> dict[str, type[FileSource]]:
    """Return the registered source for every file ending (``".csv"``); the first to claim one has it."""
    from luthier.registry import catalogue

    sources: dict[str, type[FileSource]] = {}
    for method in catalogue().all():
        if issubclass(method.cls, FileSource):
            for suffix in method.cls.suffixes:
                sources.setdefault(suffix, method.cls)
    return sources
