"""Which methods go together: rules that the methods declare, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from luthier.contracts import Optimiser
from luthier.errors import ConfigError
from luthier.registry.schema import build

if TYPE_CHECKING:
    from luthier.system import Processes

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


def clipping_refusal(config: DictConfig, name: str, cls: type[Optimiser]) -> str | None:
    """Return the one line that says why the optimiser `name`, as configured, goes with no max_grad_norm."""
    if config.max_grad_norm is None or cls.steps_in_backward is Optimiser.steps_in_backward:
        return None
    if not build(cls, config.optimiser).steps_in_backward:
        return None
    return (
        f"optimiser={name} moves parameters inside the backward pass, before the gradient's norm is known: "
        f"set max_grad_norm=null, or {cls.after_backward}"
    )


def check_processes(name: str, optimiser: Optimiser, processes: Processes) -> None:
    """Refuse an optimiser that cannot do what several processes need.

    Raises:
        ConfigError: With what to choose instead.
    """
    if processes.count > 1 and optimiser.steps_in_backward:
        raise ConfigError(
            f"optimiser={name} moves parameters inside the backward pass, before gradients are summed over "
            f"{processes.count} processes: launch one, or {optimiser.after_backward}"
        )
    if processes.sharded and optimiser.needs_whole_parameters:
        raise ConfigError(
            f"optimiser={name} needs whole parameters, and FSDP2 gives every process a part of each: launch "
            "without --use_fsdp, or choose optimiser=adamw"
        )


def check_combination(config: DictConfig, chosen: Chosen, loading: bool = True) -> None:
    """Refuse methods that do not go together, or, where a model is `loading`, not with the device.

    Raises:
        ConfigError: With what to choose instead.
    """
    from luthier.system import pick_device  # it imports torch

    said = refusal(chosen)
    if said is None and loading and any(cls.needs_device for _, cls in chosen.values()):
        said = device_refusal(chosen, pick_device(config.model.device).type)
    if said is None and loading and "optimiser" in chosen:
        said = clipping_refusal(config, *chosen["optimiser"])
    if said:
        raise ConfigError(said)
