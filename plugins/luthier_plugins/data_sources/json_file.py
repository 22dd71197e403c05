"""JSON: a list of rows, or an object that holds one."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from luthier import DataError, Register, Row, hookimpl, option, parse_json, unknown
from luthier_toolkits.files import FileSource, text_lines


@dataclass(frozen=True)
class Json(FileSource):
    """Rows of a ``.json`` file: a list of objects, or an object with such a list under one of its keys.

    The file is read whole; JSON Lines are read line by line.
    """

    source: ClassVar[str] = "https://www.rfc-editor.org/rfc/rfc8259"
    suffixes: ClassVar[tuple[str, ...]] = (".json", ".json.gz")
    expects: ClassVar[str] = "a list of objects"

    key: str | None = option(None, "Key of the object that holds the rows; null: its only list.")

    def parse(self, path: Path) -> Iterator[Row]:
        """Yield the rows, each with ``file[index]`` as its origin.

        Raises:
            DataError: The file is not JSON, or holds no list of objects.
        """
        text = "".join(line for _, line in text_lines(path))
        if not text.strip():
            return
        for index, row in enumerate(self._list(parse_json(text, str(path)), path)):
            if not isinstance(row, dict):
                raise DataError(f"{path}[{index}]: expected a JSON object, got {type(row).__name__}")
            yield Row(row, f"{path}[{index}]")

    def _list(self, value: Any, path: Path) -> list[Any]:
        if isinstance(value, dict):
            lists = [key for key, inner in value.items() if isinstance(inner, list)]
            if self.key is not None and self.key not in lists:
                raise DataError(f"{path}: {unknown('key of a list', self.key, lists)}")
            if self.key is None and len(lists) != 1:
                names = ", ".join(lists) or "none"
                raise DataError(
                    f"{path}: expected an object with one list; lists: {names}; choose one with key"
                )
            value = value[self.key or lists[0]]
        if not isinstance(value, list):
            raise DataError(f"{path}: expected a list of objects, got {type(value).__name__}")
        return value


@hookimpl
def register_data_sources(register: Register) -> None:
    """Register `json`."""
    register("json", Json)
