"""Adapters that wrap linear layers: the wrapped layer, choosing the layers, switching off and folding."""

from __future__ import annotations

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from luthier.adapters.adapted_module import Adapted, base_of, settle
from luthier.adapters.conv1d import is_conv1d
from luthier.adapters.peft_folder import PeftAdapter
from luthier.adapters.targets import select
from luthier.errors import ConfigError, ModelError
from luthier.registry import catalogue


class AdaptedLinear(Adapted, ABC):
    """A linear layer, quantised or not, whose function is changed by a few weights of its own.

    Attributes:
        name: What the model calls it.
        in_features: d_in.
        out_features: d_out.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.name = "a layer"
        self.in_features, self.out_features = linear_shape(base)

    @property
    def weight(self) -> torch.Tensor:
        """Refused: a model that reads it computes past the adapter, as Mamba's layers do.

        Raises:
            ModelError: Always.
        """
        raise ModelError(
            f"the model reads the weight of {self.name} itself, which an adapter does not change: leave such "
            "layers out of adapter.targets"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (…, d_in) to (…, d_out)."""
        y: torch.Tensor = self.adapted(x) if self.enabled else self.base(x)
        return y

    @abstractmethod
    def adapted(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (…, d_in) to (…, d_out) with the adapter."""

    @abstractmethod
    def merged_weight(self) -> torch.Tensor:
        """Return the (d_out, d_in) fp32 weight of the one linear layer that equals this one in eval mode."""

    def low_rank(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return fp32 (d_out, r) and (r, d_in) whose product is all that the adapter adds to the weight.

        None where what it adds is of no low rank, or depends on the weight.
        """
        return None

    @abstractmethod
    def adapter_state(self) -> dict[str, torch.Tensor]:
        """Return the adapter's tensors by PEFT's suffix (``lora_A.weight``), to go on the base."""

    @abstractmethod
    def load_adapter_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy in what `adapter_state` returned.

        Raises:
            ModelError: A tensor is missing, left over or of another shape.
        """

    @torch.no_grad()
    def base_weight(self) -> torch.Tensor:
        """Return the base's (d_out, d_in) weight in fp32; of a quantised base, what it computes with."""
        return weight_in_use(self.base)

    @torch.no_grad()
    def fold(self, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        """Return one plain layer that does what this one does in eval mode.

        A dense base is changed in place and keeps its dtype; a quantised one becomes an `nn.Linear` in
        `dtype`.
        """
        weight, base = self.merged_weight(), self.base
        if isinstance(base, nn.Linear) and type(base) is not nn.Linear:
            shape, bias = linear_shape(base), base.bias
            base = nn.Linear(*shape, bias is not None, device=weight.device, dtype=dtype)
            if bias is not None:
                base.bias.copy_(bias)
        write_weight(base, weight)
        return base.requires_grad_(False)


class LinearAdapter(PeftAdapter):
    """An adapter that replaces chosen linear layers by `AdaptedLinear` ones; nothing else trains.

    Attributes:
        targets: Suffix names, a regular expression or ``all-linear``: see `luthier.adapters.targets.select`.
    """

    targets: Any

    @abstractmethod
    def wrap(self, name: str, base: nn.Module, generator: torch.Generator) -> AdaptedLinear:
        """Return `base`, the layer called `name`, with an adapter that leaves its function unchanged.

        Raises:
            ConfigError: The options do not fit the layer.
        """

    @abstractmethod
    def peft_method(self) -> dict[str, Any]:
        """Return the method's own options of ``adapter_config.json``."""

    def wrap_all(
        self, bases: Mapping[str, nn.Module], generator: torch.Generator
    ) -> Mapping[str, AdaptedLinear]:
        """Return every layer of `bases` wrapped; overridden where the layers share something."""
        return {name: self.wrap(name, base, generator) for name, base in bases.items()}

    def attach(self, model: nn.Module, generator: torch.Generator) -> None:
        """Freeze `model` and wrap the targets in place.

        Raises:
            ConfigError: A target matches nothing, or an adapter is there already.
        """
        refuse_adapted(model)
        bases = {name: model.get_submodule(name) for name in select(model, self.targets)}
        model.requires_grad_(False)
        for name, layer in self.wrap_all(bases, generator).items():
            layer.name = name
            replace(model, name, layer.train(bases[name].training))

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """Return the targets as PEFT must be told to pick the same ones, and the method's options."""
        layers = adapted_layers(model)
        fan_in_fan_out = any(is_conv1d(layer.base) for layer in layers.values())
        return {"target_modules": peft_targets(model, layers), "fan_in_fan_out": fan_in_fan_out,
                **self.peft_method()}  # fmt: skip

    def state(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Return every layer's tensors by module name and PEFT's suffix."""
        return {
            f"{name}.{suffix}": tensor
            for name, layer in adapted_layers(model).items()
            for suffix, tensor in layer.adapter_state().items()
        }

    def load_state(self, model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        """Copy every layer's tensors in.

        Raises:
            ModelError: A tensor is missing, left over or of another shape.
        """
        layers = adapted_layers(model)
        if left := sorted(key for key in state if not any(key.startswith(f"{name}.") for name in layers)):
            raise ModelError(f"'{left[0]}' belongs to no adapted layer")
        for name, layer in layers.items():
            prefix = f"{name}."
            mine = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            try:
                layer.load_adapter_state(mine)
            except ModelError as error:
                raise ModelError(f"{name}: {error}") from error


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Return the adapted layers of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def adapted(model: nn.Module) -> dict[str, Adapted]:
    """Return everything in `model` that an adapter changes, by name: linear layers and whole modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def refuse_adapted(model: nn.Module) -> None:
    """Check that `model` carries no adapter.

    Raises:
        ConfigError: It does.
    """
    if adapted(model):
        raise ConfigError("the model carries an adapter already; train on its base, without model.adapter")


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Make `model` its base for the duration of the block."""
    before = {layer: layer.enabled for layer in adapted(model).values()}
    try:
        for layer in before:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled


def fold(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    """Replace all that is adapted in `model` by the plain modules it equals; see `AdaptedLinear.fold`."""
    settle(model)
    for name, layer in adapted_layers(model).items():
        replace(model, name, layer.fold(dtype))


def linear_shape(base: nn.Module) -> tuple[int, int]:
    """Return (d_in, d_out) of a linear layer of any kind."""
    base = base_of(base)
    if is_conv1d(base):
        d_in, d_out = weight_of(base).shape
        return d_in, d_out
    assert isinstance(base, nn.Linear)
    return base.in_features, base.out_features


def weight_of(base: nn.Module) -> torch.Tensor:
    """Return what a linear layer stores: (d_out, d_in), transposed in a Conv1D, packed if quantised."""
    assert isinstance(base.weight, torch.Tensor)
    return base.weight


@torch.no_grad()
def weight_in_use(base: nn.Module) -> torch.Tensor:
    """Return a linear layer's (d_out, d_in) weight in fp32; of a quantised one, what it computes with."""
    weight, base = weight_of(base), base_of(base)  # its value may be an adapter's own
    if type(base) is nn.Linear:
        return weight.float()
    if is_conv1d(base):
        return weight.T.float()
    known = (method.cls.weight(base) for method in catalogue().all() if method.kind == "quantiser")
    stored: torch.Tensor | None = next((weight for weight in known if weight is not None), None)
    if stored is not None:
        return stored
    # Whatever a quantised layer stores, its images of the unit vectors are its columns.
    units = torch.eye(linear_shape(base)[0], device=weight.device)
    columns: torch.Tensor = base(units) - base(torch.zeros_like(units[:1]))
    return columns.T.float()


@torch.no_grad()
def write_weight(base: nn.Module, weight: torch.Tensor) -> None:
    """Copy `weight` (d_out, d_in) into a dense linear layer, in the layer's dtype."""
    weight_of(base).copy_(weight.T if is_conv1d(base) else weight)


def copy_state(into: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    """Copy `state` into tensors of the same names and shapes.

    Raises:
        ModelError: A tensor is missing, left over or of another shape.
    """
    if into.keys() != state.keys():
        raise ModelError(f"expected {', '.join(sorted(into))}, found {', '.join(sorted(state)) or 'nothing'}")
    for key, tensor in into.items():
        if tensor.shape != state[key].shape:
            raise ModelError(f"{key} is {list(state[key].shape)}, expected {list(tensor.shape)}")
        with torch.no_grad():
            tensor.copy_(state[key])


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def peft_targets(model: nn.Module, layers: Mapping[str, AdaptedLinear]) -> list[str]:
    """Return suffix names if they mean exactly `layers`, else full names."""
    suffixes = {name.rpartition(".")[2] for name in layers}
    wide = re.compile(rf"(.*\.)?({'|'.join(map(re.escape, suffixes))})")
    meant = {name for name, _ in model.named_modules() if wide.fullmatch(name)}
    return sorted(suffixes if meant == layers.keys() else layers)
