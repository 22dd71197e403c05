"""Which methods go together: rules that the methods declare, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from luthier.errors import ConfigError
from luthier.precision import pick_device

Chosen = Mapping[str, tuple[str, type[Any]]]
"""The methods of a run: kind → name and class."""


def refusal(chosen: Chosen) -> str | None:
    """Return the one line that says why these methods cannot be combined, and what to choose instead."""
    for kind, (name, cls) in chosen.items():
        for other_kind, (other, other_cls) in chosen.items():
            if advice := cls.refusal_of(other_kind, other, other_cls):
                return f"{kind}={name} cannot be combined with {other_kind}={other}: {advice}"
    return None


def device_refusal(chosen: Chosen, device_type: str) -> str | None:
    """Return the one line that says which of these methods cannot run on a device of `device_type`."""
    for kind, (name, cls) in chosen.items():
        for needed, advice in cls.needs_device.items():
            if needed != device_type:
                return f"{kind}={name} needs {needed}, and this run is on {device_type}: {advice}"
    return None


def check_combination(config: DictConfig, chosen: Chosen, loading: bool = True) -> None:
    """Refuse methods that do not go together, or, where a model is `loading`, not with the device.

    Raises:
        ConfigError: With what to choose instead.
    """
    said = refusal(chosen)
    if said is None and loading and any(cls.needs_device for _, cls in chosen.values()):
        said = device_refusal(chosen, pick_device(config.model.device).type)
    if said:
        raise ConfigError(said)
