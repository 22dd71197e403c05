"""From a method's dataclass to the Hydra node that configures it, and back."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from luthier.contracts import options_of
from luthier.errors import ConfigError, LuthierError, PluginError, unknown

SCALARS = (bool, int, float, str)


def node(name: str, cls: type[Any]) -> type[Any]:
    """Return a mutable dataclass with a ``name`` field and the options of `cls`, for Hydra's ConfigStore.

    Hydra refuses overrides of a frozen node and annotations such as ``Literal``, so the method stays frozen
    and this derived node is what people override.
    """
    hints = get_type_hints(cls)
    fields: list[tuple[str, Any, Any]] = [("name", str, dataclasses.field(default=name))]
    for key, field in options_of(cls).items():
        fields.append((key, _annotation(hints[key]), _default(field)))
    return dataclasses.make_dataclass(f"{cls.__name__}Config", fields)


def check(kind: str, name: str, cls: type[Any]) -> None:
    """Refuse a method whose options no configuration could hold.

    Raises:
        PluginError: An option has the name that says which method is meant, or a type Hydra cannot hold.
    """
    if "name" in options_of(cls):
        raise PluginError(f"{kind} '{name}' has an option called 'name', the method's own name")
    try:
        OmegaConf.structured(node(name, cls))
    except (OmegaConfBaseException, NameError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise PluginError(f"{kind} '{name}' has an option that cannot be configured: {reason}") from error


def build(cls: type[Any], config: DictConfig) -> Any:
    """Build a method from its composed node.

    Raises:
        ConfigError: An option is unknown, missing, of the wrong type or value; the message names it.
    """
    name = str(config.get("name", cls.__name__))
    missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{name}: {', '.join(missing)} must be set: {_help(cls, missing[0])}")
    values: Any = OmegaConf.to_container(config, resolve=True)
    values.pop("name", None)
    hints = {key: hint for key, hint in get_type_hints(cls).items() if key in options_of(cls)}
    arguments = {str(key): _value(name, str(key), hints, value) for key, value in values.items()}
    try:
        return cls(**arguments)
    except LuthierError as error:
        raise type(error)(f"{name}: {error}") from error


def _help(cls: type[Any], key: str) -> str:
    field = options_of(cls).get(key)
    return str(field.metadata.get("help", key)) if field else key


def _value(name: str, key: str, hints: Mapping[str, Any], value: Any) -> Any:
    if key not in hints:
        raise ConfigError(f"{name}: {unknown('option', key, hints)}")
    allowed = _choices(hints[key])
    if allowed and value not in allowed:
        raise ConfigError(f"{name}.{key}: {value!r} is not one of {', '.join(map(str, allowed))}")
    if get_origin(hints[key]) is tuple and isinstance(value, list):
        return tuple(value)
    return value


def _choices(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    if _is_union(hint):
        parts = [_choices(part) or ((None,) if part is type(None) else ()) for part in get_args(hint)]
        return sum(parts, ()) if all(parts) else ()
    return ()


def _annotation(hint: Any) -> Any:
    origin = get_origin(hint)
    if hint in SCALARS:
        return hint
    if hint is Path:
        return str
    if origin is Literal:
        kinds = {type(value) for value in get_args(hint)}
        return kinds.pop() if len(kinds) == 1 else Any
    if _is_union(hint):
        rest = [part for part in get_args(hint) if part is not type(None)]
        inner = _annotation(rest[0]) if len(rest) == 1 else Any
        return Any if inner is Any else inner | None
    if origin in (tuple, list):
        inner = _annotation(get_args(hint)[0])
        return list[inner]  # type: ignore[valid-type]
    if origin in (dict, Mapping) or getattr(origin, "__name__", "") == "Mapping":
        return dict[str, _annotation(get_args(hint)[1])]  # type: ignore[misc]
    return Any


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory)
    if field.default is dataclasses.MISSING:
        return dataclasses.field(default=MISSING)
    if isinstance(field.default, tuple | list):
        values = list(field.default)
        return dataclasses.field(default_factory=lambda: list(values))
    return dataclasses.field(default=field.default)
