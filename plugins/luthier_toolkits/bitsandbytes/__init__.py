"""The layers and optimisers of bitsandbytes."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier_toolkits.bitsandbytes.library import require as require
    from luthier_toolkits.bitsandbytes.optimiser import BitsAndBytesAdam as BitsAndBytesAdam
    from luthier_toolkits.bitsandbytes.quantiser import BitsAndBytesQuantiser as BitsAndBytesQuantiser
else:
    __getattr__, __dir__, __all__ = attach(__name__)
