"""DARE: drop and rescale differences at random."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier_plugins.mergers.dare.dare import DARE as DARE
else:
    __getattr__, __dir__, __all__ = attach(__name__)
