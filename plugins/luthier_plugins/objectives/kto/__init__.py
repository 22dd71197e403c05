"""KTO: single completions labelled desirable or undesirable."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier_plugins.objectives.kto.kto import KTO as KTO
else:
    __getattr__, __dir__, __all__ = attach(__name__)
