"""Rows that say what an earlier one said are dropped."""

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from luthier import DataError, Register, Row, RowFilter, hookimpl, option, unknown

CONTENT = ("messages", "prompt", "completion", "text", "chosen", "rejected", "label", "tools")
"""What objectives read: two rows with other ids are the same if these are."""


@dataclass(frozen=True)
class ExactDuplicates(RowFilter):
    """Keeps the first of several rows with the same contents, up to white space and Unicode's spellings.

    It remembers 16 bytes a row.
    """

    source: ClassVar[str] = "Lee et al. 2022, arXiv 2107.06499, section 4 (whole examples only)"

    columns: tuple[str, ...] = option((), "Columns that are compared; empty: all that objectives read.")
    ignore_case: bool = option(False, "Take capital and small letters for the same.")
    _seen: set[bytes] = field(default_factory=set, init=False, repr=False, compare=False)

    def keep(self, row: Row) -> Row | str:
        """Return `row`, or the reason it is dropped for.

        Raises:
            DataError: A column that is to be compared is not there: without it all rows are the same.
        """
        if absent := [name for name in self.columns if name not in row.fields]:
            raise DataError(
                f"{row.origin}: exact_duplicates.columns: {unknown('column', absent[0], row.fields)}"
            )
        names = self.columns or [name for name in CONTENT if name in row.fields] or sorted(row.fields)
        values = [self._normal(row.fields.get(name)) for name in names]
        text = json.dumps([list(names), values], sort_keys=True, default=str)
        mark = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if mark in self._seen:
            return "exact duplicates"
        self._seen.add(mark)
        return row

    def _normal(self, value: Any) -> Any:
        if isinstance(value, str):
            text = " ".join(unicodedata.normalize("NFC", value).split())
            return text.casefold() if self.ignore_case else text
        if isinstance(value, Mapping):
            return {str(key): self._normal(inner) for key, inner in value.items()}
        return [self._normal(inner) for inner in value] if isinstance(value, list | tuple) else value


@hookimpl
def register_row_filters(register: Register) -> None:
    """Register `exact_duplicates`."""
    register("exact_duplicates", ExactDuplicates)
