"""The YAML presets that Luthier and its plugins bring. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.registry.method_catalogue import catalogue

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable


def presets(
    group: str, packages: Iterable[str] | None = None, folders: Iterable[str | Path] = ()
) -> list[str]:
    """Return the names of the presets of `group`: built-in, of `packages` (None: of all), in `folders`."""
    names = set()
    for package in ("luthier_conf", *(catalogue().config_packages if packages is None else packages)):
        names |= set(_yaml_files(resources.files(package) / group, ""))
    for folder in folders:
        names |= set(_yaml_files(Path(folder) / group, ""))
    return sorted(names)


def _yaml_files(folder: Traversable, prefix: str) -> Iterator[str]:
    for file in folder.iterdir() if folder.is_dir() else ():
        if file.name.endswith(".yaml"):
            yield f"{prefix}{file.name.removesuffix('.yaml')}"
        yield from _yaml_files(file, f"{prefix}{file.name}/")
