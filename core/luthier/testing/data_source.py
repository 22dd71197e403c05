"""The suite of data sources."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import ClassVar

from luthier.contracts import DataSource, Row
from luthier.testing.suite import Suite

ENOUGH = 20


class DataSourceSuite(Suite):
    """What a `luthier.DataSource` promises of its first rows."""

    method: ClassVar[type[DataSource]]

    def first(self, source: DataSource) -> list[Row]:
        """Return the first rows of `source`."""
        return list(islice(source.rows(), ENOUGH))

    def test_rows_have_fields_and_an_origin(self) -> None:
        """Every row is a `Row` with fields, and an origin of its own by which messages name it."""
        rows = self.first(self.make())
        assert rows, "it yields no row; an empty source is a luthier.DataError"
        for row in rows:
            assert isinstance(row, Row), f"rows() must yield luthier.Row, got {type(row).__name__}"
            assert isinstance(row.fields, Mapping), f"{row.origin}: fields must be a mapping"
            assert row.fields, f"{row.origin}: the row has no fields"
        origins = [row.origin for row in rows]
        assert all(origins), "a row has no origin"
        assert len(set(origins)) == len(origins), f"two rows share an origin: {origins}"

    def test_rows_come_in_the_same_order_every_time(self) -> None:
        """Two passes, of one source or of two, yield the same rows: a run can be repeated and resumed."""
        source = self.make()
        once, again, other = self.first(source), self.first(source), self.first(self.make())
        assert once == again, "a second pass yields other rows"
        assert once == other, "an equal source yields other rows; seed what it draws"

    def test_a_verdict_is_a_share_or_unknown(self) -> None:
        """`verify` takes any answer, and returns None or a number from 0 to 1."""
        source = self.make()
        for row in self.first(source):
            for answer in ("", "19", "no idea {", "⅓" * 50):
                verdict = source.verify(row, answer)
                fine = verdict is None or 0 <= verdict <= 1
                assert fine, f"{row.origin}: verify({answer[:10]!r}) returned {verdict}"
