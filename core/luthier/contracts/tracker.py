"""Trackers: configured observers of a run."""

from luthier.contracts.method import Method


class Tracker(Method):
    """Observes a run by implementing lifecycle hooks (`hookspecs.Lifecycle`) with ``@hookimpl``.

    An instance is registered for the run that configures it (``tracker=[progress]``) and for no other.
    """
