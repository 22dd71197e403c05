"""The door to Hydra's own options: Hydra imports and calls what stands there, so few of them may be set."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from luthier.config.written import keep_written, leaves, read_written
from luthier.errors import ConfigError, LuthierError

GROUPS = ("hydra/launcher", "hydra/sweeper", "hydra/sweeper/sampler")
"""What may be chosen by name: from what is installed."""
FREE = [
    line
    for line in Path(__file__).with_name("hydra_options.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]
"""What may be set: patterns of dotted keys."""


def check_override(override: Override) -> None:
    """Refuse what sets or chooses more of Hydra than is free.

    Raises:
        ConfigError: It does.
    """
    key, package = str(override.key_or_group), override.package
    if key in GROUPS and package is None and not override.is_delete():
        return
    free = not _is_hydras(key) and not (package and _is_hydras(package))
    # Hydra refuses a sweep over its own options.
    tree = {} if free and override.is_sweep_override() else {key: override.value()}
    check_tree(tree, str(override.input_line))
    if not free and ("/" in key or package):
        raise _refused(str(override.input_line), package or key)


def check_tree(tree: Any, where: str) -> None:
    """Refuse a tree of options that sets more of Hydra than is free, or names what is to be called.

    Args:
        tree: Dictionaries and lists, before interpolation.
        where: What sets them, for the message.

    Raises:
        ConfigError: It does.
    """
    for key, value in leaves(tree):
        if "_target_" in key.split("."):
            raise ConfigError(f"{where}: {key} names code to call; nothing that is configured may")
        if _is_hydras(key) and not (any(fnmatchcase(key, free) for free in FREE) and _is_plain(key, value)):
            raise _refused(where, key)


class GuardedLoader(ConfigLoaderImpl):
    """Hydra's loader, which lets nothing of one's own into Hydra's node but what is free.

    Everything that Hydra composes passes it: the config of a run, and of every job of a sweep. What files of
    one's own say of options that are text, by the types of all `known` ones, stays as it is written.
    """

    def __init__(self, path: ConfigSearchPath, known: Mapping[str, list[Any]]) -> None:
        """Load from `path`."""
        super().__init__(path)
        self.known = known

    def load_configuration(self, config_name: Any, overrides: list[str], *more: Any, **named: Any) -> Any:
        """Compose as Hydra does, once the overrides are checked."""
        for override in OverridesParser.create().parse_overrides(overrides):
            check_override(override)
        try:
            return super().load_configuration(config_name, overrides, *more, **named)
        except (RecursionError, ValueError, AssertionError, AttributeError) as error:
            if isinstance(error, LuthierError | OmegaConfBaseException):
                raise
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"a config or its defaults list has not the form of one: {reason}") from error

    def _load_single_config(self, default: ResultDefault, repo: Any) -> ConfigResult:
        path = str(default.config_path)
        homes = [source for source in repo.get_sources() if source.is_config(path)]
        own = [source for source in homes if source.provider == "one's own"]
        if own and len(homes) > 1 and ("/" in path or homes[0] in own):
            raise ConfigError(f"{own[-1].path}/{path}.yaml has the name of another {path}: rename it")
        written = read_written(Path(f"{own[0].path}/{path}.yaml"), default.package or "") if own else {}
        result = super()._load_single_config(default, repo)
        if not _is_installed(default, result):
            file = f"{result.path.removeprefix('file://')}/{path}.yaml"
            check_tree(OmegaConf.to_container(result.config), file)
        keep_written(result.config, written, self.known)
        return result


def _is_installed(default: ResultDefault, result: ConfigResult) -> bool:
    """Whether it is the node of Hydra, or of a plugin of Hydra's, where it belongs, or Luthier's own."""
    path = str(default.config_path)
    if path == "run_folder":
        return result.path == "pkg://luthier_conf"
    home = path.rpartition("/")[0].replace("/", ".")
    in_place = f"{home}.".startswith(f"{default.package}.")
    return path.startswith("hydra/") and in_place and not result.path.startswith("file:")


def _refused(where: str, key: str) -> ConfigError:
    if key == "hydra.run.dir":
        return ConfigError(f"{where}: the folder of a run is set by run_dir=FOLDER")
    return ConfigError(
        f"{where}: {key} cannot be set: of Hydra's own options only the folder of a sweep (run_dir), and "
        "launcher and sweeper with their plain options are free, as Hydra calls what the others name"
    )


def _is_hydras(key: str) -> bool:
    return re.split(r"[./@\[]", key.lstrip("/"))[0] == "hydra"


def _is_plain(key: str, value: Any) -> bool:
    # A second line would be a command of its own in a job's script; an interpolation can make a whole tree.
    return str(value).isprintable() and ("${" not in str(value) or key.startswith("hydra.sweep."))
