"""JSON Lines: one row a line."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from luthier import DataError, Register, Row, hookimpl, parse_json
from luthier_toolkits.files import FileSource, text_lines


@dataclass(frozen=True)
class JsonLines(FileSource):
    """Rows of a ``.jsonl`` file (also ``.jsonl.gz``), read line by line."""

    source: ClassVar[str] = "https://jsonlines.org"
    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".ndjson", ".jsonl.gz")
    expects: ClassVar[str] = "one JSON object a line"

    def parse(self, path: Path) -> Iterator[Row]:
        """Yield the rows, each with ``file:line`` as its origin; empty lines are passed over.

        Raises:
            DataError: A line is not a JSON object.
        """
        for number, line in text_lines(path):
            if line.strip():
                origin = f"{path}:{number}"
                if number == 1 and line.strip() == "[":
                    raise DataError(
                        f"{origin}: a list over several lines, expected {self.expects}; try data=json"
                    )
                row = parse_json(line.rstrip(), origin)
                if not isinstance(row, dict):
                    raise DataError(f"{origin}: expected a JSON object, got {type(row).__name__}")
                yield Row(row, origin)


@hookimpl
def register_data_sources(register: Register) -> None:
    """Register `jsonl`."""
    register("jsonl", JsonLines)
