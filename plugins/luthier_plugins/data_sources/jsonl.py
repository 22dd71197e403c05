"""JSON Lines: one row a line."""

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from luthier import ConfigError, DataError, DataSource, Register, Row, hookimpl, option


@dataclass(frozen=True)
class JsonLines(DataSource):
    """Rows of a ``.jsonl`` file, read in order.

    An answer is right if it equals the row's ``answer`` or, without one, a text ``completion``, up to white
    space at the ends.
    """

    source: ClassVar[str] = "https://jsonlines.org"

    path: str = option("???", "The file.")
    limit: int | None = option(None, "Read so many rows at most.")

    def rows(self) -> Iterator[Row]:
        """Yield the rows, each with ``file:line`` as its origin.

        Raises:
            ConfigError: There is no such file.
            DataError: The file is empty, or a line is not a JSON object.
        """
        path = Path(self.path).expanduser()
        if not path.is_file():
            what = "is a folder, expected a file" if path.is_dir() else "there is no such file"
            raise ConfigError(f"path={path}: {what}")
        count = 0
        # Bytes, so that a line that is not UTF-8 is named; the first may carry a byte-order mark.
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                if self.limit is not None and count >= self.limit:
                    return
                count += 1
                yield Row(_parse(line.removeprefix(BOM_UTF8), f"{path}:{number}"), f"{path}:{number}")
        if not count:
            raise DataError(f"{path}: the file is empty; expected one JSON object a line")

    def verify(self, row: Row, answer: str) -> float | None:
        """Compare with the row's ``answer``, or its text ``completion``."""
        expected = row.fields.get("answer")
        if expected is None:
            expected = row.fields.get("completion")
        if not isinstance(expected, str | int | float):
            return None
        return float(answer.strip() == str(expected).strip())


def _parse(line: bytes, origin: str) -> dict[str, object]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{origin}: not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict):
        raise DataError(f"{origin}: expected a JSON object, got {type(row).__name__}")
    return row


@hookimpl
def register_data_sources(register: Register) -> None:
    """Register `jsonl`."""
    register("jsonl", JsonLines)
