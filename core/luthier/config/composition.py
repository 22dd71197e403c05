"""Composing a run with Hydra: schemas in the store, plugin presets on the path, mistakes in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.hydra import Hydra
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from luthier.config.hydra_errors import check_overrides, explain
from luthier.config.hydra_node import GuardedLoader
from luthier.config.validation import validate
from luthier.contracts import KINDS, Command, options_of
from luthier.registry import Catalogue, catalogue, command, composed_commands, node


class PluginPresets(SearchPathPlugin):
    """Appends the preset package of every plugin to Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append after the built-in presets, which therefore win."""
        for package, provider in catalogue().config_packages.items():
            search_path.append(provider=provider, path=f"pkg://{package}")


@functools.cache
def prepare() -> Catalogue:
    """Put every schema in Hydra's store and every preset package on its path; done once per process."""
    Plugins.instance().register(PluginPresets)
    store = ConfigStore.instance()
    for name in composed_commands():
        store.store(name=f"{name}_schema", node=command(name).options, provider="luthier")
        store.store(name=name, node={"defaults": list(_defaults(name, command(name)))}, provider="luthier")
    for method in catalogue().all():
        kind = KINDS[method.kind]
        # A name registered twice is refused by `find` when a run asks for it; the first keeps the schema.
        if f"{method.name}.yaml" not in store.repo.get(kind.group, {}):
            store.store(
                group=kind.group,
                name=method.name,
                node=node(method.name, method.cls),
                package=kind.package(method.name) if kind.many else None,
                provider=method.plugin.provider,
            )
    return catalogue()


def _defaults(name: str, of: Command) -> Iterator[Any]:
    """Yield the defaults list of the primary config of a command."""
    yield f"{name}_schema"
    if of.single is None:
        yield "run_folder"
    yield from ({group: choice} for group, choice in of.defaults.items())
    yield "_self_"
    yield from ({f"override hydra/{part}_logging": "none"} for part in ("hydra", "job"))


def compose(verb: str, overrides: list[str] | None = None, folders: Iterable[str | Path] = ()) -> DictConfig:
    """Compose and check the config of `verb` as the command line would.

    Args:
        verb: A command that takes a config, e.g. ``"train"``.
        overrides: Hydra overrides, e.g. ``["adapter=lora", "optimiser.lr=1e-4"]``.
        folders: Where presets and recipes of one's own are, as ``--config-dir`` says.

    Raises:
        ConfigError: An override is misspelt, mistyped, or names what cannot be combined.
        PluginError: A method is unknown or its plugin is broken.
    """
    prepare()
    overrides = overrides or []
    try:
        if (resumed := command(verb).resumed(overrides)) is not None:
            validate(verb, resumed)
            return resumed
        with session(folders):
            config = hydra.compose(verb, overrides=opened(overrides))
            validate(verb, config)
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, known_keys(verb)) from error
    return config


@contextlib.contextmanager
def session(folders: Iterable[str | Path]) -> Iterator[Hydra]:
    """Start Hydra on the configs of Luthier, of its plugins, and in `folders` of one's own."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_module("luthier_conf", version_base="1.3"):
        app = GlobalHydra.instance().hydra
        assert app is not None
        path = app.config_loader.get_search_path()
        for folder in folders:
            path.prepend("one's own", f"file://{Path(folder).absolute()}", SearchPathQuery("schema", None))
        app.config_loader = GuardedLoader(path)
        yield app


def opened(overrides: list[str]) -> list[str]:
    """Let overrides put new keys into options that are mappings, which Hydra wants marked by ``++``.

    Raises:
        ConfigError: An override has not the form of one.
    """
    check_overrides(overrides)
    tables = [
        f"{package}.{key}"
        for method in catalogue().all()
        for key, field in options_of(method.cls).items()
        for package in (KINDS[method.kind].package(method.name), f"eval_{KINDS[method.kind].group}")
        if field.default_factory is not dataclasses.MISSING and isinstance(field.default_factory(), dict)
    ]
    tables += ["model.shape", "auxiliary", "stages", "tasks"]
    keys = {override: f"{override.partition('=')[0]}." for override in overrides}
    return [f"++{o}" if any(keys[o].startswith(f"{key}.") for key in tables) else o for o in overrides]


def known_keys(verb: str) -> list[str]:
    """Return every key and group that an override of `verb` may start with, dotted, whatever is selected."""
    keys = [kind.group for kind in KINDS.values()] + ["recipe", "hydra"]
    keys += [f"{KINDS[m.kind].package(m.name)}.{key}" for m in catalogue().all() for key in options_of(m.cls)]
    plain: Any = OmegaConf.to_container(OmegaConf.structured(command(verb).options), throw_on_missing=False)
    return keys + list(_dotted(plain))


def _dotted(tree: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
