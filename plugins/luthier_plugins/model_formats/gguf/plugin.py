"""GGUF files and packages that carry one, as models."""

from __future__ import annotations

from pathlib import Path

from luthier import hookimpl


@hookimpl
def find_model(name: str | None, package: str | None) -> Path | None:
    """Return the folder that a ``.gguf`` file, or the one in `package`, is converted to."""
    if package is None and (name is None or Path(name).suffix != ".gguf"):
        return None
    from luthier_plugins.model_formats.gguf.conversion import gguf_folder, gguf_in_package

    return gguf_folder(gguf_in_package(package) if package else Path(str(name)).expanduser())
