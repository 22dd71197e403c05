"""Modules whose parameters an adapter changes: embeddings, heads, biases, experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn


class Adapted(nn.Module):
    """What stands in a model in place of a module that an adapter changes.

    Attributes:
        base: The module, never changed: with ``enabled = False`` the model is the base model exactly.
        enabled: Whether the adapter takes part.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.enabled = True


class ParameterChange(nn.Module, ABC):
    """What an adapter makes of one parameter; its own parameters are fp32.

    Attributes:
        below: Where PEFT keeps the base, below the name of the module.
    """

    below: ClassVar[str] = "base_layer"

    @abstractmethod
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Return what is used in place of the base's `value`, in its dtype."""

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """Return the change's tensors, which are no copies, by PEFT's name below that of the module."""


class OwnValue(ParameterChange):
    """A parameter with a value of its own: PEFT's ``modules_to_save``, a bias, an embedding that grew.

    Attributes:
        parameter: What it is called in its module.
        trains: It trains; else it is what PEFT found in the base when it saved.
    """

    def __init__(self, parameter: str, value: torch.Tensor, trains: bool) -> None:
        super().__init__()
        self.parameter, self.trains = parameter, trains
        self.value = nn.Parameter(value.float(), requires_grad=trains)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Return the own value."""
        return self.value.to(value.dtype)

    def state(self) -> dict[str, torch.Tensor]:
        """Return it by its name."""
        return {self.parameter: self.value.detach()}

    def note(self, options: dict[str, Any], place: str, whole: bool) -> None:
        """Tell PEFT's `options` of it: all of the module at `place` has own values, or a bias has."""
        if self.trains and whole and place not in options["modules_to_save"]:
            options["modules_to_save"].append(place)
        elif self.trains and not whole:
            options["bias"] = "all"


class TokenRows(ParameterChange):
    """Rows of their own for some tokens, in an embedding or output head; PEFT's trainable tokens.

    Attributes:
        ids: (n,), which rows.
        rows: (n, d), in place of the base's.
    """

    below: ClassVar[str] = "token_adapter.base_layer"
    ids: torch.Tensor

    def __init__(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("ids", ids, persistent=False)
        self.rows = nn.Parameter(rows.float())

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Return (V, d) with the own rows; to the others no gradient goes."""
        return value.index_copy(0, self.ids, self.rows.to(value.dtype))

    def state(self) -> dict[str, torch.Tensor]:
        """Return the rows."""
        return {"token_adapter.trainable_tokens_delta": self.rows.detach()}

    def note(self, options: dict[str, Any], place: str, whole: bool) -> None:
        """Tell PEFT's `options` of it."""
        options["trainable_token_indices"][place] = self.ids.tolist()


class AdaptedModule(Adapted):
    """Any module, run with other values of some parameters; what else is asked of it, its base answers.

    Attributes:
        changes: By the parameter's name, in the order they apply. One that two modules share, as an embedding
            and the head that is tied to it, is in both.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.changes = nn.ModuleDict()

    def in_use(self) -> dict[str, torch.Tensor]:
        """Return the changed parameters by name, as they are used now."""
        return {name: self.value(name) for name in (self.changes if self.enabled else ())}

    def value(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the parameter `name` with its changes, in `dtype` or else its own."""
        value: torch.Tensor = self.base.get_parameter(name).to(dtype)
        for made in self.changes_of(name):
            value = made(value)
        return value

    def changes_of(self, name: str) -> list[ParameterChange]:
        """Return the changes of the parameter `name`."""
        changes: Any = self.changes[name]
        return list(changes)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the base does, with these parameters."""
        return torch.func.functional_call(self.base, self.in_use(), args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """Return the base's, a changed parameter as it is used."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base, changes = self._modules["base"], self._modules.get("changes")
            changed = isinstance(changes, nn.ModuleDict) and name in changes
            return self.value(name) if changed and self.enabled else getattr(base, name)


def adapted_modules(model: nn.Module) -> dict[str, AdaptedModule]:
    """Return the modules of `model` with changed parameters, by name; see `AdaptedModule`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedModule)}


def base_of(module: nn.Module) -> nn.Module:
    """Return `module`, out of its `AdaptedModule` if it has one."""
    return module.base if isinstance(module, AdaptedModule) else module


def change(model: nn.Module, changes: Iterable[tuple[str, ParameterChange]]) -> None:
    """Let `changes`, with the parameters' full names, take part in `model`, before those that are there."""
    for name, made in changes:
        place, _, parameter = name.rpartition(".")
        module = model.get_submodule(place)
        if isinstance(module, Adapted) and not isinstance(module, AdaptedModule):
            place, module = f"{place}.base", module.base
        if not isinstance(module, AdaptedModule):
            module = AdaptedModule(module).train(module.training)
            parent, _, child = place.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
        if parameter not in module.changes:
            module.changes[parameter] = nn.ModuleList()
        module.changes[parameter].insert(0, made)  # type: ignore[operator]


@torch.no_grad()
def settle(model: nn.Module, into: nn.Module | None = None) -> None:
    """Write every change into its base, rounded once, and put the bases back in place.

    What is tied stays tied where all its changes are shared, and is no longer tied elsewhere.

    Args:
        model: Changed in place.
        into: Another copy of its base, to write into instead; `model` stays as it is.
    """
    written: dict[tuple[Any, ...], nn.Parameter] = {}
    for place, module in adapted_modules(model).items():
        target = module.base if into is None else into.get_submodule(place.removesuffix(".base"))
        for name in module.changes:
            key = (module.base.get_parameter(name), *module.changes_of(name))
            if key not in written:
                value = module.value(name, torch.float32).to(target.get_parameter(name).dtype, copy=True)
                written[key] = nn.Parameter(value, requires_grad=False)
            setattr(target, name, written[key])
        if into is None:
            parent, _, child = place.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base)
    _say_if_untied(model if into is None else into)


def _say_if_untied(model: Any) -> None:
    from transformers import PreTrainedModel

    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if head is not None and not isinstance(head, Adapted):  # an adapter's own head was not tied before
        tied = head.weight is model.get_input_embeddings().weight
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = config.tie_word_embeddings and tied
