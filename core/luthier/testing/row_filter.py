"""The suite of row filters."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from luthier.contracts import Row, RowFilter
from luthier.testing.objective import ROWS
from luthier.testing.suite import Suite


class RowFilterSuite(Suite):
    """What a `luthier.RowFilter` promises.

    Attributes:
        rows: Rows it is shown.
    """

    method: ClassVar[type[RowFilter]]
    rows: ClassVar[Sequence[Mapping[str, Any]]] = (*ROWS, ROWS[0], {"prompt": "", "completion": ""})

    def verdicts(self) -> list[Row | str]:
        """Return what a fresh filter says of the rows, shown in order."""
        made = self.make()
        rows = [Row(copy.deepcopy(dict(fields)), f"row {n}") for n, fields in enumerate(self.rows)]
        return [made.keep(row) for row in rows]

    def test_it_keeps_a_row_or_says_why_not(self) -> None:
        """`keep` returns a `Row`, or a reason that is not empty."""
        for verdict in self.verdicts():
            assert isinstance(verdict, Row | str), f"keep returned a {type(verdict).__name__}, not Row or str"
            assert verdict, "the reason for dropping a row is empty: it is what people are shown"

    def test_a_kept_row_keeps_its_origin(self) -> None:
        """A rewritten row still says where it came from, and the row it was made from is not written to."""
        made = self.make()
        for number, fields in enumerate(self.rows):
            row = Row(copy.deepcopy(dict(fields)), f"row {number}")
            verdict = made.keep(row)
            assert row.fields == fields, f"{row.origin}: keep wrote into the row; return a new one"
            if isinstance(verdict, Row):
                assert verdict.origin == row.origin, f"{row.origin} became {verdict.origin}"

    def test_a_fresh_filter_decides_alike(self) -> None:
        """Two filters of equal options that see the same rows decide alike."""
        assert self.verdicts() == self.verdicts(), "a fresh filter decides otherwise; keep no global state"
