"""YAML of one's own: what is written where an option is text stays that text, whatever YAML makes of it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf

from luthier.config.typed_options import is_text
from luthier.errors import ConfigError

MOST = 100_000
"""Values that a file may have; aliases of aliases multiply without end."""


def read_written(file: Path, at: str = "") -> dict[str, str]:
    """Return what a YAML file holds, by dotted key below `at`, as it is written.

    Raises:
        ConfigError: It holds too much, or itself.
    """
    with file.open(encoding="utf-8") as text, contextlib.suppress(RecursionError):
        values = leaves(yaml.load(text, yaml.BaseLoader), at)
        if len(found := dict(itertools.islice(values, MOST))) < MOST:
            return found
    raise ConfigError(f"{file} is nested too deeply, holds itself, or has {MOST:,} values and more")


def keep_written(config: Any, written: Mapping[str, str], known: Mapping[str, list[Any]]) -> None:
    """Put into `config` what is `written` wherever an option is text: 1.10 is no number.

    Args:
        config: What OmegaConf made of the file.
        written: What `read_written` returned.
        known: The types of every option by dotted key.
    """
    for key, text in written.items():
        if "${" not in text and is_text(key, known) and OmegaConf.select(config, key) is not None:
            OmegaConf.update(config, key, text)


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of everything in a tree that holds no other."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    if not inner:
        yield prefix, tree
    for key, value in inner:
        yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
