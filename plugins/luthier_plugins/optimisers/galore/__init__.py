"""GaLore: Adam in a low-rank subspace of each gradient."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier_plugins.optimisers.galore.galore import GaLore as GaLore
    from luthier_plugins.optimisers.galore.subspace import (
        cold_basis as cold_basis,
        exact_basis as exact_basis,
        warm_basis as warm_basis,
    )
else:
    __getattr__, __dir__, __all__ = attach(__name__)
