"""Helpers of mergers: weights, shares, means of what agrees."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier_toolkits.merging.weights import (
        check_weights as check_weights,
        disjoint_mean as disjoint_mean,
        shares_of as shares_of,
        weights_of as weights_of,
    )
else:
    __getattr__, __dir__, __all__ = attach(__name__)
