"""Refusing a composed config: keys that nothing reads, methods that do not exist or do not combine."""

from __future__ import annotations

import dataclasses
from typing import Any

from omegaconf import DictConfig, OmegaConf

from luthier.config.building import selected
from luthier.config.renamed import new_name
from luthier.contracts import KINDS, options_of
from luthier.errors import ConfigError, nearest
from luthier.registry import catalogue, check_combination, command, require


def validate(name: str, config: DictConfig) -> None:
    """Refuse keys that nothing reads, methods that do not exist, and pairs that do not combine."""
    of = command(name)
    if config.get("plugins"):
        require(list(config.plugins.required))
    fields = {field.name for field in dataclasses.fields(of.options)}
    _refuse_unread(set(config) - fields, fields, "")
    for field in dataclasses.fields(of.options):
        if dataclasses.is_dataclass(field.default_factory):
            below = {inner.name for inner in dataclasses.fields(field.default_factory)}
            _refuse_unread(set(config[field.name]) - below, below, f"{field.name}.")
    for kind in KINDS.values():
        if of.defaults.get(kind.group) and not kind.many and config.get(kind.group) is None:
            raise ConfigError(f"'{kind.group}' must be chosen: {kind.group}=NAME")
    of.check(config)
    # A folder that the clock names never holds a run to go on with.
    plain: Any = OmegaConf.to_container(config)
    if config.get("resume") == "auto" and "${now" in str(plain["run_dir"]):
        raise ConfigError("resume=auto needs a folder that stays the same: set run_dir=FOLDER")
    _drop_unselected(config)
    chosen = {}
    for kind, where, child in selected(config):
        cls = catalogue().find(kind.name, str(child.name)).cls
        own = {*options_of(cls), "name"}
        _refuse_unread(set(child) - own, own, f"{where}.")
        chosen[kind.name] = (str(child.name), cls)
    check_combination(config, chosen, loading=of.loads_weights)


def _drop_unselected(config: DictConfig) -> None:
    """Leave out options that a recipe has for a method which an override has taken out of the selection."""
    for kind in (kind for kind in KINDS.values() if kind.many):
        nodes = config.get(f"{kind.group}s")
        if isinstance(nodes, DictConfig):
            OmegaConf.set_struct(nodes, False)
            for name in [name for name, node in nodes.items() if "name" not in node]:
                del nodes[name]
            OmegaConf.set_struct(nodes, True)


def _refuse_unread(unread: set[Any], known: set[str], where: str) -> None:
    for key in sorted(map(str, unread)):
        new = new_name(where + key)
        hint = f"did you mean '{new}'? " if new and new.rpartition(".")[2] in known else nearest(key, known)
        raise ConfigError(f"nothing reads '{where}{key}': {hint}known: {', '.join(sorted(known))}")
