"""Data sources: rows with their origin, and what counts as a right answer."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from luthier.method import Method


@dataclass(frozen=True)
class Row:
    """One row of data.

    Attributes:
        fields: The row's columns, e.g. ``{"prompt": …, "completion": …}``.
        origin: Where it stands, for messages: ``file:line`` or ``task[index]``.
    """

    fields: Mapping[str, Any]
    origin: str


class DataSource(Method):
    """Yields rows. A subclass whose answers can be verified overrides `verify`."""

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """Yield the rows, in the same order every time.

        Raises:
            DataError: A file or row that cannot be read, named by its origin.
        """

    def verify(self, row: Row, answer: str) -> float | None:
        """Return 1.0 if `answer` solves `row`, 0.0 if not, between for partial credit; None if unknown."""
        return None
