"""Every quantiser × adapter × optimiser that goes together, and what each would take."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig

from luthier import config as configs
from luthier.errors import LuthierError
from luthier.kernels import wants_wide
from luthier.registry import catalogue, device_refusal, refusal
from luthier.system import weights_and_autocast
from luthier.trees import Tree
from luthier_plugins.commands.plan.memory import Counted, Methods, memory, passed
from luthier_plugins.commands.plan.shapes import Sampled, on_meta
from luthier_plugins.commands.plan.simulation import Pass, Setting

log = logging.getLogger("luthier")


@dataclass(frozen=True)
class Choice:
    """One combination.

    Attributes:
        quantiser: Its name; None: no quantiser.
        adapter: Its name.
        optimiser: Its name.
        trained: Parameters that train.
        bits: Bits of a weight of the base.
        total: Bytes it takes.
        headroom: Bytes that are left; None where the device is not known.
    """

    quantiser: str | None
    adapter: str
    optimiser: str
    trained: int
    bits: float
    total: float
    headroom: float | None

    @property
    def overrides(self) -> str:
        """What chooses it on the command line."""
        quantised = f"quantiser={self.quantiser} " if self.quantiser else "quantiser=null "
        return f"{quantised}adapter={self.adapter} optimiser={self.optimiser}"

    @property
    def order(self) -> tuple[Any, ...]:
        """What fits is first: trains most, rounds the base least, is smallest; then what misses least."""
        misses = self.headroom is not None and self.headroom < 0
        return misses, self.total if misses else -self.trained, -self.bits, self.total


def ranked(
    config: DictConfig,
    model_config: Any,
    dtype: torch.dtype,
    device: str,
    bounds: tuple[float, float | None],
    tree: Tree,
    known: tuple[Pass, float],
) -> tuple[Choice, ...]:
    """Return the combinations of all registered methods that are not refused, the best one first.

    The methods that `config` names have its options, all others their defaults.

    Args:
        config: The plan's.
        model_config: transformers' config of the model.
        dtype: What the model computes in.
        device: ``cpu`` or ``cuda``.
        bounds: Bytes of the process without the model, and of the device.
        tree: What a pack holds.
        known: The pass of the adapter that `config` names, and its `Counted.dense`.
    """
    ranking = _Ranking(config, model_config, dtype, device, bounds[0], tree)
    frees = configs.build("optimiser", config.optimiser).steps_in_backward
    ranking.passes[str(config.adapter.name), frees] = known
    choices = []
    for names in ranking.allowed():
        try:
            choices.append(ranking.choice(names, bounds[1]))
        except LuthierError as error:
            log.debug("%s cannot be planned: %s", names, error)
    return tuple(sorted(choices, key=lambda choice: choice.order))


def setting_of(config: DictConfig, dtype: torch.dtype, device: str, methods: Methods) -> Setting:
    """Return how a run of `config` with other `methods` computes, in steps of several packs."""
    stored, autocast = weights_and_autocast(dtype, methods.adapter.trains_base)
    model, frees = config.model, methods.optimiser.steps_in_backward
    wide = wants_wide(model.wide_residual, methods.objective.needs_reference)
    return Setting(
        device, stored, autocast, model.fused, model.gradient_checkpointing, frees=frees, wide=wide
    )


@dataclass
class _Ranking:
    """Counts and passes that combinations share are made once."""

    config: DictConfig
    model_config: Any
    dtype: torch.dtype
    device: str
    baseline: float
    tree: Tree

    def __post_init__(self) -> None:
        self.bases: dict[torch.dtype, Sampled] = {}
        self.counts: dict[tuple[str, str | None], Counted] = {}
        self.passes: dict[tuple[str, bool], tuple[Pass, float]] = {}

    def allowed(self) -> Iterator[dict[str, str | None]]:
        """Yield the names of what goes together, on the device and with the objective."""
        registry = catalogue()
        for quantiser in (None, *registry.names("quantiser")):
            for adapter in registry.names("adapter"):
                for optimiser in registry.names("optimiser"):
                    names = {"quantiser": quantiser, "adapter": adapter, "optimiser": optimiser}
                    chosen = {**names, "objective": str(self.config.objective.name)}
                    classes = {
                        kind: (name, registry.find(kind, name).cls) for kind, name in chosen.items() if name
                    }
                    if not (refusal(classes) or device_refusal(classes, self.device)):
                        yield names

    def choice(self, names: Mapping[str, str | None], capacity: float | None) -> Choice:
        """Return what `names` take.

        Raises:
            LuthierError: One cannot be built by its name alone, or does not fit the model.
        """
        quantiser = self._method("quantiser", names["quantiser"]) if names["quantiser"] else None
        objective = configs.build("objective", self.config.objective)
        adapter, optimiser = (self._method(kind, names[kind]) for kind in ("adapter", "optimiser"))
        methods = Methods(adapter, optimiser, objective, quantiser)
        setting = setting_of(self.config, self.dtype, self.device, methods)
        counted = self._counted(str(names["adapter"]), names["quantiser"], methods, setting.stored)
        pack_pass = self._passed(str(names["adapter"]), counted, methods, setting)
        total = memory(counted, methods, pack_pass, setting, self.baseline).total
        return Choice(
            quantiser=names["quantiser"],
            adapter=str(names["adapter"]),
            optimiser=str(names["optimiser"]),
            trained=counted.trained,
            bits=quantiser.bits_per_weight() if quantiser else 8.0 * setting.stored.itemsize,
            total=total,
            headroom=None if capacity is None else capacity - total,
        )

    def _counted(self, adapter: str, quantiser: str | None, methods: Methods, stored: torch.dtype) -> Counted:
        if stored not in self.bases:
            self.bases[stored] = Sampled.of(on_meta(self.model_config, stored))
        if (adapter, quantiser) not in self.counts:
            base = self.bases[stored].copied()
            self.counts[adapter, quantiser] = Counted.of(base, methods.adapter, methods.quantiser)
        return self.counts[adapter, quantiser]

    def _passed(self, adapter: str, counted: Counted, methods: Methods, setting: Setting) -> Pass:
        """Return the pass of the adapter, whatever the quantiser: one dense weight more or less at a time."""
        if (adapter, setting.frees) not in self.passes:
            pack_pass = passed(counted.model, [self.tree], methods.objective, setting)
            self.passes[adapter, setting.frees] = pack_pass, counted.dense
        pack_pass, dense = self.passes[adapter, setting.frees]
        return dataclasses.replace(pack_pass, peak=pack_pass.peak - dense + counted.dense)

    def _method(self, kind: str, name: str | None) -> Any:
        node = self.config[kind]
        if node and node.name == name:
            return configs.build(kind, node)
        return configs.build_method(kind, {"name": name})
