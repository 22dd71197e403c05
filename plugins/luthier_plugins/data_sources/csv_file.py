"""CSV and TSV: a table whose first line names the columns."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from luthier import ConfigError, DataError, Register, Row, hookimpl, option
from luthier_toolkits.files import FileSource, text_lines


@dataclass(frozen=True)
class Csv(FileSource):
    """Rows of a ``.csv`` or ``.tsv`` file, read line by line; the first line names the columns."""

    source: ClassVar[str] = "https://www.rfc-editor.org/rfc/rfc4180"
    suffixes: ClassVar[tuple[str, ...]] = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
    expects: ClassVar[str] = "a line with the names of the columns, and rows"

    delimiter: str | None = option(
        None, "What stands between two cells; null: a tab in .tsv files, a comma in others."
    )

    def __post_init__(self) -> None:
        """Refuse a delimiter that is no character."""
        super().__post_init__()
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '\r\n"'):
            raise ConfigError(f"delimiter={self.delimiter!r} must be one character, e.g. ';'")

    def parse(self, path: Path) -> Iterator[Row]:
        """Yield the rows, each with ``file:line`` of its first line as its origin.

        Raises:
            DataError: A row has another number of cells than the first, or a quote is never closed.
        """
        # The limit of 128 KiB a cell is the process's; a document may well be longer.
        csv.field_size_limit(2**31 - 1)
        tab = ".tsv" in path.suffixes
        # Strict, so that a quote that is never closed does not swallow the rest of the file.
        lines = (line for _, line in text_lines(path))
        reader = csv.reader(lines, delimiter=self.delimiter or ("\t" if tab else ","), strict=True)
        names: list[str] | None = None
        line = 1
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{path}:{line}: not CSV: {error}") from error
            if cells is None:
                return
            if cells and names is None:
                names = _names(cells, f"{path}:{line}")
            elif cells and names is not None:
                yield Row(_fields(names, cells, f"{path}:{line}"), f"{path}:{line}")
            line = reader.line_num + 1


def _names(cells: list[str], origin: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{origin}: two columns are called '{repeated[0]}'; the first line names the columns")
    return names


def _fields(names: list[str], cells: list[str], origin: str) -> dict[str, str]:
    if len(cells) != len(names):
        raise DataError(
            f"{origin}: {len(cells)} cells for the {len(names)} columns {', '.join(names)}; "
            "quote a cell that holds the delimiter, or set delimiter"
        )
    return dict(zip(names, cells, strict=True))


@hookimpl
def register_data_sources(register: Register) -> None:
    """Register `csv`."""
    register("csv", Csv)
