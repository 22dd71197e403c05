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

    An answer is right if it equals the row's ``answer`` or, without one, its ``completion``, up to thoughts
    before it and white space at the ends. A subclass that knows better overrides `verify`.
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
        expected = _expected(row)
        return None if expected is None else float(spoken(answer) == spoken(expected))


def spoken(answer: str) -> str:
    """Return what an answer says, behind its thoughts if it has some, without white space around it."""
    return answer.rpartition("</think>")[2].strip()


def _expected(row: Row) -> str | None:
    answer, completion = row.fields.get("answer"), row.fields.get("completion")
    if isinstance(completion, list) and len(completion) == 1:  # of a call nobody knows how it is spelled
        completion = None if completion[0].get("tool_calls") else completion[0].get("content")
    answer = completion if answer is None else answer
    return str(answer) if isinstance(answer, str | int | float) else None
