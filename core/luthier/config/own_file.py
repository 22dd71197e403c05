"""A YAML file of one's own, or the config of a run, as what a command composes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from luthier.config.hydra_node import check_tree
from luthier.config.typed_options import types
from luthier.config.written import keep_written, read_written
from luthier.errors import ConfigError
from luthier.registry import command


@dataclass(frozen=True)
class OwnFile:
    """What a file says: more of the defaults list, what it chooses of each group, and values."""

    defaults: list[Any]
    chosen: dict[str, Any]
    values: dict[str, Any]


def read_own(verb: str, file: Path, overrides: Sequence[str]) -> OwnFile:
    """Read `file`: groups are chosen in a defaults list, by a key, or by a method's name among its options.

    A file that sets every option is the config of a run: the new run has a folder of its own, and what an
    override replaces leaves with its options.

    Raises:
        ConfigError: It is no mapping, holds too much, or reaches into Hydra.
    """
    written, config = read_written(file), OmegaConf.load(file)
    keep_written(config, written, types(verb))
    values: Any = OmegaConf.to_container(config)
    defaults = values.pop("defaults", None) or [] if isinstance(values, dict) else None
    if not isinstance(defaults, list):
        raise ConfigError(f"{file}: expected options as OPTION: VALUE, and of defaults a list")
    check_tree(values, str(file))
    of = command(verb)
    whole = {field.name for field in dataclasses.fields(of.options)} <= set(values)
    chosen, rest = {}, []
    for entry in defaults:
        group, choice = next(iter(entry.items())) if isinstance(entry, dict) and entry else (entry, None)
        group = str(group).split(" ")[-1].lstrip("/")
        if isinstance(entry, dict) and group in of.defaults:
            chosen[group] = choice
        else:
            rest.append(entry)
    for group in of.defaults:
        chosen |= _chosen(group, values, whole)
    if whole:
        for key in ("run_dir", "resume"):
            values.pop(key, None)
        for group in _replaced(chosen, overrides):
            logging.getLogger("luthier").warning("%s: %s gives way, with its options", file, group)
            values.pop(group.rpartition("@")[2], None)
    return OwnFile(rest, chosen, values)


def _chosen(group: str, values: dict[str, Any], whole: bool) -> dict[str, Any]:
    """Take out of `values` what they choose of a group."""
    node, several = values.get(key := group.rpartition("@")[2]), values.get(f"{group}s")
    if isinstance(node, str | list):
        return {group: values.pop(key)}
    if isinstance(node, dict) and "name" in node:
        return {group: node.pop("name")}
    if isinstance(several, dict):
        named = [name for name, own in several.items() if isinstance(own, dict) and own.pop("name", None)]
        return {group: named} if named or whole else {}
    return {}


def _replaced(chosen: dict[str, Any], overrides: Sequence[str]) -> Iterator[str]:
    for override in overrides:
        group, _, choice = override.partition("=")
        if isinstance(chosen.get(group), str) and choice != chosen[group] and "," not in choice:
            yield group
