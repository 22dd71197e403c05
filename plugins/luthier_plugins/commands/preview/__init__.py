"""The command `preview`: the first examples as the model will see them."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier_plugins.commands.preview.previewing import PreviewResult as PreviewResult, preview as preview
else:
    __getattr__, __dir__, __all__ = attach(__name__)
