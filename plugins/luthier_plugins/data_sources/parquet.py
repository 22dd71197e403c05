"""Parquet: a table in columns, read in batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from luthier import ConfigError, DataError, Register, Row, hookimpl, option
from luthier_toolkits.files import FileSource, without_nulls


@dataclass(frozen=True)
class Parquet(FileSource):
    """Rows of a ``.parquet`` file, of which a batch at a time is in memory."""

    source: ClassVar[str] = "https://parquet.apache.org/docs/file-format"
    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)
    expects: ClassVar[str] = "a Parquet table with rows"

    batch_rows: int = option(1024, "Rows that are read at a time.")

    def __post_init__(self) -> None:
        """Refuse a batch without rows."""
        super().__post_init__()
        if self.batch_rows < 1:
            raise ConfigError(f"batch_rows={self.batch_rows} must be at least 1")

    def parse(self, path: Path) -> Iterator[Row]:
        """Yield the rows, each with ``file[index]`` as its origin.

        Raises:
            ConfigError: pyarrow is not installed.
            DataError: The file is not Parquet.
        """
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise ConfigError("needs the package pyarrow: pip install 'luthier[data]'") from error
        if not path.stat().st_size:
            return
        index = 0
        try:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=self.batch_rows):
                    for fields in batch.to_pylist():
                        yield Row(
                            {name: without_nulls(cell) for name, cell in fields.items()}, f"{path}[{index}]"
                        )
                        index += 1
        except pyarrow.ArrowException as error:
            said = str(error).splitlines()[0]
            raise DataError(f"{path}: not a Parquet file that can be read: {said}") from error


@hookimpl
def register_data_sources(register: Register) -> None:
    """Register `parquet`."""
    register("parquet", Parquet)
