"""The command `fold`: an adapter and its base made one plain model."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier_plugins.commands.fold.folding import fold as fold
    from luthier_plugins.commands.fold.report import FoldReport as FoldReport
else:
    __getattr__, __dir__, __all__ = attach(__name__)
