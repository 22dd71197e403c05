"""Whole models in transformers' layout, read back after they were written."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier_toolkits.saving.whole_model import save_model as save_model, verify_saved as verify_saved
else:
    __getattr__, __dir__, __all__ = attach(__name__)
