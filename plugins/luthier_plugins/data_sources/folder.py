"""A folder of files: every one is read by the source that reads files of its ending."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from luthier import ConfigError, DataSource, Register, Row, hookimpl, option
from luthier_toolkits.files import file_sources


@dataclass(frozen=True)
class Folder(DataSource):
    """Rows of all files of a folder, in the order of their names; unknown endings are passed over."""

    source: ClassVar[str] = "Luthier"

    path: str = option("???", "The folder.")
    suffix: str | None = option(
        None, "Only files with this ending, e.g. .parquet; null: all that can be read."
    )
    recursive: bool = option(True, "Read the folders inside it too.")
    limit: int | None = option(None, "Read so many rows at most.")

    def __post_init__(self) -> None:
        """Refuse a limit that reads nothing."""
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit={self.limit} must be at least 1; null reads all rows")

    def rows(self) -> Iterator[Row]:
        """Yield the files' rows, each with the origin its file gives it.

        Raises:
            ConfigError: There is no such folder, or nothing in it can be read.
            DataError: A file is broken.
        """
        left = self.limit
        for file, suffix in self._files():
            member = file_sources()[suffix](
                path=str(file), limit=left, format=self.format, columns=self.columns
            )
            for row in member.rows():
                yield replace(row, source=member)
                left = None if left is None else left - 1
            if left == 0:
                return

    def verify(self, row: Row, answer: str) -> float | None:
        """Let the source of the row's file decide."""
        return super().verify(row, answer) if row.source is None else row.source.verify(row, answer)

    def _files(self) -> list[tuple[Path, str]]:
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            what = "is a file, expected a folder" if folder.exists() else "there is no such folder"
            raise ConfigError(f"path={folder}: {what}")
        # Longest first: of ".jsonl.gz" and ".gz" the former says more.
        known = sorted(file_sources(), key=len, reverse=True)
        wanted = [ending for ending in known if self.suffix in (None, ending)]
        if not wanted:
            raise ConfigError(f"suffix={self.suffix}: no source reads such files; known: {', '.join(known)}")
        files = []
        for file in sorted(folder.rglob("*") if self.recursive else folder.iterdir()):
            hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
            suffix = next((ending for ending in wanted if file.name.lower().endswith(ending)), None)
            if file.is_file() and suffix and not hidden:
                files.append((file, suffix))
        if not files:
            raise ConfigError(f"path={folder}: holds no file that ends with {', '.join(sorted(wanted))}")
        return files


@hookimpl
def register_data_sources(register: Register) -> None:
    """Register `folder`."""
    register("folder", Folder)
