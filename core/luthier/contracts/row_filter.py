"""Row filters: what keeps, rewrites or drops a row before it is encoded."""

from abc import abstractmethod

from luthier.contracts.data_source import Row
from luthier.contracts.method import Method


class RowFilter(Method):
    """Sees every row once, in order, renamed and laid out, before it is encoded.

    One is built anew for every source of a run, so it may remember what it
    saw, in fields with ``init=False``.
    """

    @abstractmethod
    def keep(self, row: Row) -> Row | str:
        """Return the row, as it is or rewritten by `dataclasses.replace`, or the reason for dropping it.

        Reasons are counted and shown, so they are few and name no row.
        """
