"""Composing a run with Hydra: schemas in the store, plugin presets on the path, every key read or refused."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from luthier import schema
from luthier.catalogue import Catalogue, catalogue, require
from luthier.combining import check_combination
from luthier.errors import ConfigError, PluginError, nearest, unknown
from luthier.explain import check_overrides, explain
from luthier.kinds import KINDS, Kind
from luthier.method import options_of
from luthier.overflow import OVERFLOW, UNUSABLE
from luthier.settings import VERBS, WITHOUT_WEIGHTS

CONFIG_PATH = "pkg://luthier_conf"
VERSION_BASE = "1.3"


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
    for verb, root in VERBS.items():
        store.store(name=f"{verb}_schema", node=root, provider="luthier")
    for one in catalogue().all():
        kind = KINDS[one.kind]
        # A name registered twice is refused by `find` when a run asks for it; the first keeps the schema.
        if f"{one.name}.yaml" not in store.repo.get(kind.group, {}):
            store.store(
                group=kind.group,
                name=one.name,
                node=schema.node(one.name, one.cls),
                package=kind.package(one.name) if kind.many else None,
                provider=one.plugin.provider,
            )
    return catalogue()


def compose(verb: str, overrides: list[str] | None = None) -> DictConfig:
    """Compose and check the config of `verb` as the command line would.

    Args:
        verb: ``"train"``, ``"evaluate"``, ``"sample"``, ``"fold"``, ``"preview"`` or ``"plan"``.
        overrides: Hydra overrides, e.g. ``["adapter=lora", "optimiser.lr=1e-4"]``.

    Raises:
        ConfigError: An override is misspelt, mistyped, or names what cannot be combined.
        PluginError: A method is unknown or its plugin is broken.
    """
    prepare()
    if verb == "train" and (run := resumed_run(overrides or [])):
        return _resumed(run, overrides or [])
    GlobalHydra.instance().clear()
    with hydra.initialize_config_module("luthier_conf", version_base=VERSION_BASE):
        try:
            config = hydra.compose(verb, overrides=opened(overrides or []))
            validate(verb, config)
        except (HydraException, OmegaConfBaseException) as error:
            raise explain(error, known_keys(verb)) from error
    return config


def resumed_run(overrides: list[str]) -> str | None:
    """Return the run folder that ``resume=FOLDER`` names; None for ``auto`` or without it."""
    named = [one.removeprefix("resume=").strip("'\"") for one in overrides if one.startswith("resume=")]
    return named[-1] if named and named[-1] not in ("auto", "null", "") else None


def _resumed(run: str, overrides: list[str]) -> DictConfig:
    from luthier.resume import config_of

    check_overrides(overrides)
    try:
        config = config_of(run, [one for one in overrides if not one.startswith("resume=")])
        validate("train", config)
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, known_keys("train")) from error
    return config


def opened(overrides: list[str]) -> list[str]:
    """Let overrides put new keys into options that are mappings, which Hydra wants marked by ``++``.

    Raises:
        ConfigError: An override has not the form of one.
    """
    check_overrides(overrides)
    tables = [
        f"{package}.{key}"
        for one in catalogue().all()
        for key, field in options_of(one.cls).items()
        for package in (KINDS[one.kind].package(one.name), f"eval_{KINDS[one.kind].group}")
        if isinstance(_made(field), dict)
    ]
    tables += ["model.shape", "also", "before", "tasks"]
    return [f"++{one}" if _starts(one, tables) else one for one in overrides]


def _made(field: dataclasses.Field[Any]) -> Any:
    return None if field.default_factory is dataclasses.MISSING else field.default_factory()


def _starts(override: str, keys: list[str]) -> bool:
    name = override.partition("=")[0]
    return any(name == key or name.startswith(f"{key}.") for key in keys)


def build(kind: str, config: DictConfig) -> Any:
    """Build the method of `kind` that the composed node `config` names."""
    return schema.build(catalogue().find(kind, str(config.name)).cls, config)


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
        merged = OmegaConf.merge(OmegaConf.structured(schema.node(values["name"], cls)), dict(values))
    except OmegaConfBaseException as error:
        raise explain(error, list(options_of(cls))) from error
    assert isinstance(merged, DictConfig)
    return schema.build(cls, merged)


def selected(config: DictConfig) -> Iterator[tuple[Kind, str, DictConfig]]:
    """Yield every method of a composed config: its kind, where it stands, its node."""
    for kind in KINDS.values():
        if kind.many:
            nodes = config.get(f"{kind.group}s") or {}
            yield from ((kind, f"{kind.group}s.{name}", child) for name, child in nodes.items())
            continue
        for key in (kind.group, f"eval_{kind.group}"):
            node = config.get(key)
            if isinstance(node, DictConfig):
                if node:  # quantiser=none is an empty node
                    yield kind, key, node
            elif node is not None:
                # Hydra takes `quantiser=x` for a plain value where no method of the kind is installed.
                catalogue().find(kind.name, str(node))


def validate(verb: str, config: DictConfig) -> None:
    """Refuse keys that nothing reads, methods that do not exist, and pairs that do not combine."""
    if config.get("plugins"):
        require(list(config.plugins.required))
    fields = {field.name for field in dataclasses.fields(VERBS[verb])}
    _refuse_unread(set(config) - fields, fields, "")
    for field in dataclasses.fields(VERBS[verb]):
        if dataclasses.is_dataclass(field.default_factory):
            below = {inner.name for inner in dataclasses.fields(field.default_factory)}
            _refuse_unread(set(config[field.name]) - below, below, f"{field.name}.")
    _check_ranges(config)
    # A folder that the clock names never holds a run to go on with.
    plain: Any = OmegaConf.to_container(config)
    if config.get("resume") == "auto" and "${now" in str(plain["run_dir"]):
        raise ConfigError("resume=auto needs a folder that stays the same: set run_dir=FOLDER")
    _drop_unselected(config)
    chosen = {}
    for kind, where, child in selected(config):
        cls = catalogue().find(kind.name, str(child.name)).cls
        options = {*options_of(cls), "name"}
        _refuse_unread(set(child) - options, options, f"{where}.")
        chosen[kind.name] = (str(child.name), cls)
    check_combination(config, chosen, loading=verb not in WITHOUT_WEIGHTS)


def _drop_unselected(config: DictConfig) -> None:
    """Leave out options that a recipe has for a method which an override has taken out of the selection."""
    for kind in (kind for kind in KINDS.values() if kind.many):
        nodes = config.get(f"{kind.group}s")
        if isinstance(nodes, DictConfig):
            OmegaConf.set_struct(nodes, False)
            for name in [name for name, node in nodes.items() if "name" not in node]:
                del nodes[name]
            OmegaConf.set_struct(nodes, True)


def _check_ranges(config: DictConfig) -> None:
    for key in ("batch_size", "pack_tokens", "log_every", "max_length", "max_steps", "clip_norm", "examples"):
        value = config.get(key)
        if value is not None and not value > 0:
            raise ConfigError(f"{key}={value} must be positive")
    if "evaluation" not in config:  # nothing is trained or measured
        return
    _check_evaluation(config)
    if "overflow" not in config:  # of the rows of a run
        return
    for key in ("memory_gb", "tflops", "efficiency", "tokens"):
        value = config.get(key)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{key}={value} must be positive")
    if config.overflow not in OVERFLOW:
        raise ConfigError(unknown("overflow", str(config.overflow), OVERFLOW))
    if config.unusable not in UNUSABLE:
        raise ConfigError(unknown("unusable", str(config.unusable), UNUSABLE))
    if not 0 <= config.seed < 2**31:
        raise ConfigError(f"seed={config.seed} must be in [0, 2³¹)")
    if config.evaluation.every and "eval_data" in config and config.eval_data is None:
        raise ConfigError("evaluation.every needs held-out rows: choose data@eval_data=SOURCE")
    if "checkpoint" in config:
        _check_checkpoints(config)


def _check_evaluation(config: DictConfig) -> None:
    for key, least in (("every", 0), ("batch_size", 1), ("max_new_tokens", 1), ("samples", 0)):
        value = config.evaluation.get(key, least)
        if value < least:
            raise ConfigError(f"evaluation.{key}={value} must be at least {least}")


def _check_checkpoints(config: DictConfig) -> None:
    for key, least in (("every", 0), ("minutes", 0), ("keep", 1)):
        value = config.checkpoint[key]
        if value is not None and not value >= least:
            raise ConfigError(f"checkpoint.{key}={value} must be at least {least}")
    for key in ("patience", "restore_best"):
        if config.evaluation[key] and not config.evaluation.every:
            raise ConfigError(
                f"evaluation.{key} needs evaluations while training: set evaluation.every=STEPS"
            )
    if config.evaluation.patience is not None and config.evaluation.patience < 1:
        raise ConfigError(f"evaluation.patience={config.evaluation.patience} must be at least 1")


def _refuse_unread(unread: set[Any], known: set[str], where: str) -> None:
    for key in sorted(map(str, unread)):
        hint = nearest(key, known)
        raise ConfigError(f"nothing reads '{where}{key}': {hint}known: {', '.join(sorted(known))}")


def known_keys(verb: str) -> list[str]:
    """Return every key and group that an override of `verb` may start with, dotted, whatever is selected."""
    keys = [kind.group for kind in KINDS.values()] + ["recipe", "hydra"]
    for one in catalogue().all():
        package = KINDS[one.kind].package(one.name)
        keys += [f"{package}.{key}" for key in options_of(one.cls)]
    plain = OmegaConf.to_container(OmegaConf.structured(VERBS[verb]), throw_on_missing=False)
    assert isinstance(plain, dict)
    return keys + list(_dotted(plain))


def _dotted(tree: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")


__all__ = ["PluginError", "build", "build_method", "compose", "prepare", "selected", "validate"]
