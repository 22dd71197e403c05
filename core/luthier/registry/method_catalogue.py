"""The catalogue: which methods exist, who brought them, and what is wrong with those that do not load."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
import logging
import pkgutil
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pluggy

from luthier.contracts import ALL_KINDS, COMMAND, NAME, PROJECT, SPECIFICATIONS, Kind
from luthier.errors import LuthierError, PluginError, unknown
from luthier.registry.discovery import CORE, Plugin, plugins, unmet_core_requirement


@dataclass(frozen=True)
class Registered:
    """A method class, its name, and the plugin that registered it."""

    kind: str
    name: str
    cls: type[Any]
    plugin: Plugin

    def __str__(self) -> str:
        return f"{self.plugin.provider} ({self.cls.__module__}.{self.cls.__qualname__})"


class Catalogue:
    """Every registered method, by kind and name.

    Plugins load one by one: a broken one becomes an entry of `broken` and stops only a run that asks for it.
    """

    def __init__(self, plugins: list[Plugin]) -> None:
        self.hooks = _manager()
        self.broken: dict[str, str] = {}
        self.config_packages: dict[str, str] = {}
        self._methods: dict[tuple[str, str], list[Registered]] = defaultdict(list)
        for plugin in plugins:
            self._load(plugin)

    def names(self, kind: str) -> list[str]:
        """Return the sorted names registered for `kind`."""
        return sorted(name for of, name in self._methods if of == kind)

    def all(self) -> list[Registered]:
        """Return every registration; a name registered twice appears twice."""
        return [method for _, registered in sorted(self._methods.items()) for method in registered]

    def find(self, kind: str, name: str) -> Registered:
        """Return the one registration of `name`.

        Raises:
            PluginError: The name is unknown, its plugin is broken, or two plugins registered it.
        """
        registered = self._methods.get((kind, name), [])
        if len(registered) == 1:
            return registered[0]
        if registered:
            others = " and by ".join(str(method) for method in registered)
            raise PluginError(
                f"{kind} '{name}' is registered twice: by {others}. "
                f"Uninstall one or set LUTHIER_BLOCKED={registered[-1].plugin.distribution}."
            )
        if reason := self.broken.get(f"{kind}.{name}"):
            raise PluginError(f"{kind} '{name}' cannot be used: {reason}")
        raise PluginError(unknown(kind, name, self.names(kind)))

    def _load(self, plugin: Plugin) -> None:
        try:
            reason = unmet_core_requirement(plugin.requires) if plugin.distribution != CORE else None
            if reason is None:
                self._register(plugin, plugin.entry.load())
        except KeyboardInterrupt:
            raise
        except PluginError as error:
            reason = str(error)
        # A plugin is a stranger's code: whatever its import raises must not stop the others.
        except BaseException as error:  # noqa: BLE001
            reason = _said(error)
        if reason is not None:
            self.broken[plugin.entry.name] = f"{plugin.provider} {reason}"

    def _register(self, plugin: Plugin, implementation: object) -> None:
        trial = _manager()
        trial.register(implementation, name=plugin.entry.name)
        _check_hooks(trial, implementation)
        collected: list[Registered] = []
        for kind in ALL_KINDS.values():
            getattr(trial.hook, kind.hook)(register=functools.partial(_collect, collected, plugin, kind))
        packages = trial.hook.config_packages()
        for package in packages:
            _check_presets(package)
        # Nothing of a plugin counts until all of it is sound.
        self.hooks.register(implementation, name=f"{plugin.distribution}:{plugin.entry.name}")
        for method in collected:
            self._methods[method.kind, method.name].append(method)
        self.config_packages.update(dict.fromkeys(packages, plugin.provider))


class _Manager(pluggy.PluginManager):
    """Names the plugin whose hook raises, or would end the program."""

    def register(self, plugin: Any, name: str | None = None) -> str | None:
        registered = super().register(plugin, name)
        known = name or f"{type(plugin).__module__}.{type(plugin).__qualname__}"
        for caller in self.get_hookcallers(plugin) or []:
            for impl in (impl for impl in caller.get_hookimpls() if impl.plugin is plugin):
                if impl.wrapper or impl.hookwrapper:
                    raise PluginError(f"hook '{caller.name}' must not be a wrapper: it would hide the others")
                impl.function = _named(impl.function, known, caller.name)  # type: ignore[misc]
        return registered


def _named(function: Callable[..., Any], plugin: str, hook: str) -> Callable[..., Any]:
    """Return `function` with what it raises told in one line; what it is told of an error hides none."""

    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except KeyboardInterrupt:
            raise
        # A plugin is a stranger's code, and even SystemExit(0) must not pass for the run's own end.
        except BaseException as error:
            if isinstance(error, LuthierError) and hook != "on_train_error":
                raise
            failure = PluginError(f"plugin {plugin}: {hook} raised {_said(error)}")
            failure.status = 2 if isinstance(error, OSError) else 1  # a full disk is a person's to mend
            if hook != "on_train_error":
                raise failure from error
            logging.getLogger("luthier").warning("%s", failure)

    return call


def _said(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{type(error).__name__}: {error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _manager() -> pluggy.PluginManager:
    manager = _Manager(PROJECT)
    for spec in SPECIFICATIONS:
        manager.add_hookspecs(spec)
    return manager


def _check_presets(package: object) -> None:
    if not (isinstance(package, str) and package.replace(".", "_").isidentifier()):
        raise PluginError(f"config_packages returns {package!r}, expected the dotted name of one package")
    if (found := importlib.util.find_spec(package)) is None or not found.submodule_search_locations:
        raise PluginError(f"config_packages names {package}, which is no package that it brings")
    importlib.import_module(package)  # Hydra will, to find what lies in it


def _check_hooks(trial: pluggy.PluginManager, implementation: object) -> None:
    known = [name for spec in SPECIFICATIONS for name in vars(spec) if name[0] != "_"]
    for caller in trial.get_hookcallers(implementation) or []:
        if caller.spec is None:
            raise PluginError(unknown("hook", caller.name, known))
        for impl in caller.get_hookimpls():
            # pluggy 1.6 would pass the default instead of the caller's value.
            if impl.kwargnames:
                raise PluginError(f"hook '{caller.name}' must not give its arguments defaults")
    if not trial.get_hookcallers(implementation):
        raise PluginError("implements no hook; mark its functions with @luthier.hookimpl")


def _public() -> set[str]:
    """Return the names of `luthier` that a command must not have: what it offers, and its rooms."""
    face = sys.modules["luthier"]
    return {*face.__all__, *(module.name for module in pkgutil.iter_modules(face.__path__))}


def _collect(into: list[Registered], plugin: Plugin, kind: Kind, name: str, cls: type[Any]) -> None:
    base = kind.base_class()
    if (kind is COMMAND) != (plugin.kind == COMMAND.name):
        raise PluginError(f"an entry point 'command.{name}' registers a command, and no other does")
    if kind is COMMAND and plugin.distribution != CORE and name in _public():
        raise PluginError(f"command '{name}' would hide luthier.{name}; choose another name")
    if not NAME.fullmatch(name):
        raise PluginError(f"{kind.name} name '{name}' must match {NAME.pattern}")
    if not (inspect.isclass(cls) and issubclass(cls, base)):
        raise PluginError(
            f"{kind.name} '{name}' must be a class that inherits luthier.{base.__name__}: {cls!r}"
        )
    if not dataclasses.is_dataclass(cls) or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise PluginError(f"{kind.name} '{name}' must be a frozen dataclass: {cls.__qualname__}")
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        raise PluginError(f"{kind.name} '{name}' leaves {', '.join(missing)} undefined: {cls.__qualname__}")
    if kind is not COMMAND:  # whose options are those of another class: help does without OmegaConf
        importlib.import_module("luthier.registry.schema").check(kind.name, name, cls)
    into.append(Registered(kind.name, name, cls, plugin))


@functools.cache
def catalogue() -> Catalogue:
    """Return the catalogue of the installed plugins, loaded once per process; what is broken is logged."""
    installed = Catalogue([plugin for plugin in plugins() if plugin.kind != COMMAND.name])
    for name, reason in installed.broken.items():
        logging.getLogger("luthier").warning("%s is left out: %s", name, reason)
    return installed


def require(requirements: list[str]) -> None:
    """Check ``plugins.required`` entries such as ``"luthier-toy>=0.2"``.

    Raises:
        PluginError: A distribution is missing or has another version.
    """
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import InvalidRequirement, Requirement

    for text in requirements:
        try:
            wanted = Requirement(text)
            actual = version(wanted.name)
        except InvalidRequirement as error:
            raise PluginError(f"plugins.required: '{text}' is not a requirement: {error}") from error
        except PackageNotFoundError as error:
            raise PluginError(f"plugins.required: {text} is not installed; pip install '{text}'") from error
        if not wanted.specifier.contains(actual, prereleases=True):
            raise PluginError(f"plugins.required: {text} is wanted, but {wanted.name} {actual} is installed")
