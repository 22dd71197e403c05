"""DoRA: a low-rank update whose rows have a trained magnitude."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier_plugins.adapters.dora.dora import DoRA as DoRA
else:
    __getattr__, __dir__, __all__ = attach(__name__)
