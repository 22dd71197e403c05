"""Row filters: what keeps, rewrites or drops a row before it is encoded."""

from abc import abstractmethod

from luthier.data_source import Row
from luthier.method import Method


class RowFilter(Method):
    """Sees every row once, in order."""

    @abstractmethod
    def keep(self, row: Row) -> Row | str:
        """Return the row, rewritten or as it is, or the reason for dropping it; reasons are counted."""
