"""Composing a run with Hydra: schemas in the store, plugin presets on the path, mistakes in one line."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
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
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from luthier.config.hydra_errors import PRIMARY, check_overrides, explain
from luthier.config.hydra_node import GuardedLoader
from luthier.config.own_file import OwnFile, read_own
from luthier.config.typed_options import typed, types
from luthier.config.validation import validate
from luthier.contracts import KINDS
from luthier.errors import LuthierError
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


def _primary(verb: str, own: OwnFile) -> dict[str, Any]:
    """Return the primary config of a command: its defaults list, and the values of one's own file."""
    of = command(verb)
    folder = ["run_folder"] if of.single is None else []
    groups = [{group: choice} for group, choice in of.defaults.items()]
    last = [] if "_self_" in own.defaults else ["_self_"]
    chosen = [{f"override /{group}": choice} for group, choice in own.chosen.items()]
    quiet = [{f"override hydra/{part}_logging": "none"} for part in ("hydra", "job")]
    return {
        "defaults": [f"{verb}_schema", *folder, *groups, *own.defaults, *last, *chosen, *quiet],
        **own.values,
    }


def compose(
    verb: str,
    overrides: Sequence[str] = (),
    file: str | Path | None = None,
    folders: Iterable[str | Path] = (),
) -> DictConfig:
    """Compose and check the config of `verb` as the command line would.

    Args:
        verb: A command that takes a config, e.g. ``"train"``.
        overrides: Hydra overrides, e.g. ``["adapter=lora", "optimiser.lr=1e-4"]``.
        file: A YAML file of one's own, or the ``config.yaml`` of a run.
        folders: Where presets and recipes of one's own are, as ``--config-dir`` says.

    Raises:
        ConfigError: An override is misspelt, mistyped, or names what cannot be combined.
        PluginError: A method is unknown or its plugin is broken.
    """
    prepare()
    with in_one_line(verb, file):
        words = opened(verb, overrides or ())
        if (config := command(verb).resumed(words)) is None:
            with session(verb, words, file, folders):
                config = hydra.compose(PRIMARY, overrides=words)
        validate(verb, config)
    return config


@contextlib.contextmanager
def session(
    verb: str, overrides: Sequence[str], file: str | Path | None = None, folders: Iterable[str | Path] = ()
) -> Iterator[Hydra]:
    """Start Hydra on what `verb` is composed of: configs of Luthier, of its plugins, and of one's own."""
    own = read_own(verb, Path(file), overrides) if file else OwnFile([], {}, {})
    # A file of one's own cannot have its name, and so not be taken for it.
    ConfigStore.instance().store(name=PRIMARY, node=_primary(verb, own), provider="luthier")
    GlobalHydra.instance().clear()
    with hydra.initialize_config_module("luthier_conf", version_base="1.3"):
        app: Any = GlobalHydra.instance().hydra
        path = app.config_loader.get_search_path()
        own_folders = [*folders, *([Path(file).parent] if file else [])]
        for folder in dict.fromkeys(Path(folder).resolve() for folder in own_folders):
            path.prepend("one's own", f"file://{folder}", SearchPathQuery("schema", None))
        app.config_loader = GuardedLoader(path, types(verb))
        yield app


@contextlib.contextmanager
def in_one_line(verb: str, file: str | Path | None = None) -> Iterator[None]:
    """Raise what Hydra says of a config, or the system of a file, as one line."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise explain(error, known_keys(verb), file) from error  # a choice that is not there is an OSError
    except OSError as error:
        raise LuthierError(f"{error.filename or file or 'a file'}: {error.strerror or error}") from error


def opened(verb: str, overrides: Iterable[str], several: bool = False) -> list[str]:
    """Return `overrides` as Hydra is to read them: text stays text, and mappings take new keys.

    Args:
        verb: Whose options they set.
        overrides: As they were typed.
        several: Whether a comma stands between the values of several runs.

    Raises:
        ConfigError: An override has not the form of one.
    """
    known = types(verb)
    words = [typed(override, known, several) for override in overrides]
    check_overrides(words)
    return words


def known_keys(verb: str) -> list[str]:
    """Return every key and group that an override of `verb` may start with, dotted, whatever is selected."""
    keys = [key for key in types(verb) if not key.startswith("eval_")]
    nodes = {key.rpartition(".")[0] for key in keys} - {""}
    return [*(kind.group for kind in KINDS.values()), "recipe", "hydra", *sorted(nodes), *keys]
