"""From composed nodes to methods: the catalogue says which class, its schema which options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from luthier.config.hydra_errors import explain
from luthier.contracts import KINDS, Kind, options_of
from luthier.errors import ConfigError, unknown
from luthier.registry import build as build_from_schema, catalogue, node


def build(kind: str, config: DictConfig) -> Any:
    """Build the method of `kind` that the composed node `config` names."""
    return build_from_schema(catalogue().find(kind, str(config.name)).cls, config)


def build_method(kind: str, values: Mapping[str, Any]) -> Any:
    """Build a method of `kind` from plain values: its ``name``, and options as Hydra would check them.

    For methods that are made of others, as a mixture is of sources.

    Raises:
        ConfigError: The name is missing, or an option is unknown or has the wrong type.
        PluginError: There is no such method.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("name"), str):
        raise ConfigError(f"expected {{name: {kind.upper()}, …}}, got {values!r}")
    cls = catalogue().find(kind, values["name"]).cls
    for key in set(map(str, values)) - {*options_of(cls), "name"}:
        raise ConfigError(f"{values['name']}: {unknown('option', key, options_of(cls))}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(node(values["name"], cls)), dict(values))
    except OmegaConfBaseException as error:
        raise explain(error, list(options_of(cls))) from error
    assert isinstance(merged, DictConfig)
    return build_from_schema(cls, merged)


def selected(config: DictConfig) -> Iterator[tuple[Kind, str, DictConfig]]:
    """Yield every method of a composed config: its kind, where it stands, its node."""
    for kind in KINDS.values():
        if kind.many:
            nodes = config.get(f"{kind.group}s") or {}
            yield from ((kind, f"{kind.group}s.{name}", child) for name, child in nodes.items())
            continue
        for key in (kind.group, f"eval_{kind.group}"):
            chosen = config.get(key)
            if isinstance(chosen, DictConfig):
                if chosen:  # quantiser=none is an empty node
                    yield kind, key, chosen
            elif chosen is not None:
                # Hydra takes `quantiser=x` for a plain value where no method of the kind is installed.
                catalogue().find(kind.name, str(chosen))
