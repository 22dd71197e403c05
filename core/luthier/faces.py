"""The face of a package: its public names, each stated once, loaded at first use.

Importing a face costs nothing of what stands behind it, so that `luthier --help` needs no torch.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def attach(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` of `package`, from its own source.

    Its public names are those that its ``__init__.py`` imports under ``if TYPE_CHECKING:``, in the form that
    type checkers read: ``from luthier.trees.tree import Tree as Tree``.

    Args:
        package: The dotted name of a package whose ``__init__.py`` is being imported.
    """
    file = sys.modules[package].__file__
    assert file is not None
    homes = dict(_homes(ast.parse(Path(file).read_text(encoding="utf-8"))))

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(importlib.import_module(homes[name]), name)

    return load, lambda: sorted(homes), sorted(homes)


def _homes(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield the name and the module of every import that is for type checkers alone."""
    for block in tree.body:
        if (
            isinstance(block, ast.If)
            and isinstance(block.test, ast.Name)
            and block.test.id == "TYPE_CHECKING"
        ):
            for node in block.body:
                if isinstance(node, ast.ImportFrom) and node.module:
                    yield from ((alias.name, node.module) for alias in node.names)
