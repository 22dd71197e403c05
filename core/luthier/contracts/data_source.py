"""Data sources: rows with their origin, and what counts as a right answer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from luthier.contracts.method import Method, option


@dataclass(frozen=True)
class Row:
    """One row of data.

    Attributes:
        fields: The row's columns, e.g. ``{"prompt": …, "completion": …}``.
        origin: Where it stands, for messages: ``file:line`` or ``task[index]``.
        source: The source among several that a mixture or folder took it from, whose `columns`, `format`
            and `verify` are the row's; None: the source that is read.
    """

    fields: Mapping[str, Any]
    origin: str
    source: DataSource | None = None


@dataclass(frozen=True, kw_only=True)
class DataSource(Method):
    """Yields rows as they stand in the data; core applies `columns` and `format` to every one.

    An answer is right if it equals the row's ``answer`` or, without one, its ``completion``, up to white
    space at the ends. A subclass that knows better overrides `verify`.
    """

    format: Literal["auto", "messages", "sharegpt", "instruction", "completion", "text"] = option(
        "auto", "Layout of the rows: messages, sharegpt, instruction, completion or text; auto: by columns."
    )
    columns: Mapping[str, str] = option({}, "What the data calls a column, e.g. {prompt: question}.")

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """Yield the rows as they stand, in the same order every time.

        Raises:
            DataError: A file or row that cannot be read, named by its origin.
        """

    def verify(self, row: Row, answer: str) -> float | None:
        """Return 1.0 if `answer` solves `row`, 0.0 if not, between for partial credit; None if unknown."""
        expected = row.fields.get("answer")
        if expected is None:
            expected = _spoken(row.fields.get("completion"))
        if not isinstance(expected, str | int | float):
            return None
        return float(answer.strip() == str(expected).strip())


def _spoken(completion: object) -> object:
    """Return the text of a completion that is one message, and any other as it is."""
    if isinstance(completion, list) and len(completion) == 1:
        return completion[0].get("content")
    return completion
