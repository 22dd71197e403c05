"""Progress on the terminal."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier_plugins.trackers.progress.progress import ProgressBar as ProgressBar
else:
    __getattr__, __dir__, __all__ = attach(__name__)
