"""Data files: found, decoded, parsed, with their line numbers."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier_toolkits.files.file_source import (
        FileSource as FileSource,
        file_sources as file_sources,
        text_lines as text_lines,
        without_nulls as without_nulls,
    )
else:
    __getattr__, __dir__, __all__ = attach(__name__)
