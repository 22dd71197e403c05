"""Adam and its parameter groups."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier_toolkits.adam.adam import AdamOptimiser as AdamOptimiser, module_of as module_of
else:
    __getattr__, __dir__, __all__ = attach(__name__)
