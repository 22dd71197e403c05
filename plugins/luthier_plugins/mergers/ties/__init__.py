"""TIES: trim, elect signs, merge what agrees."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier_plugins.mergers.ties.ties import TIES as TIES
else:
    __getattr__, __dir__, __all__ = attach(__name__)
