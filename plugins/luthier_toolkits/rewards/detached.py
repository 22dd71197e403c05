"""Several adapters on one base: each a set of layers that take each other's place in the model.

A layer of an adapter wraps the base's layer and never changes it, so two adapters may wrap the same one; only
one of them is on the model at a time, with the score head that belongs to it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from luthier.adapters import adapted, load_adapter, replace
from luthier.models import NAME, adapter_readers, head_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class DetachedAdapter:
    """An adapter, with its head, that is on the model only inside `on`.

    Attributes:
        layers: Name → adapted layer.
        head: The score head; None: without one.
    """

    layers: Mapping[str, nn.Module]
    head: nn.Module | None

    @classmethod
    def load(cls, model: PreTrainedModel, folder: Path) -> DetachedAdapter:
        """Load the adapter in `folder` for `model`, whatever that wears; its weights are frozen.

        Raises:
            ModelError: The folder is incomplete, or does not fit the model.
        """
        with taken_off(model):
            try:
                load_adapter(model, folder, adapter_readers(), trainable=False)
                return cls(dict(adapted(model)), head_of(model))
            finally:
                _take_off(model)

    @classmethod
    def copy_of(cls, model: PreTrainedModel) -> DetachedAdapter:
        """Return a frozen copy of what `model` wears now, over the same base; without a head."""
        copies = {}
        for name, layer in adapted(model).items():
            copies[name] = copy.deepcopy(layer, {id(layer.base): layer.base})
            copies[name].requires_grad_(False)
        return cls(copies, None)

    @contextlib.contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Let `model` wear this adapter, and nothing else, for the duration of the block."""
        with taken_off(model):
            try:
                _put_on(model, self.layers, self.head)
                yield
            finally:
                _take_off(model)


@contextlib.contextmanager
def taken_off(model: nn.Module) -> Iterator[None]:
    """Make `model` its bare base, without a score head, for the duration of the block."""
    layers, head = dict(adapted(model)), head_of(model)
    _take_off(model)
    try:
        yield
    finally:
        _put_on(model, layers, head)


def _put_on(model: nn.Module, layers: Mapping[str, nn.Module], head: nn.Module | None) -> None:
    for name, layer in layers.items():
        replace(model, name, layer)
    if head is not None:
        model.add_module(NAME, head)


def _take_off(model: nn.Module) -> None:
    for name, layer in reversed(adapted(model).items()):  # one may be inside another
        replace(model, name, layer.base)
    model._modules.pop(NAME, None)
