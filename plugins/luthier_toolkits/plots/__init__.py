"""Plots as files."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier_toolkits.plots.figures import figure as figure
else:
    __getattr__, __dir__, __all__ = attach(__name__)
