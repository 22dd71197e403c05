"""Changed parameters in PEFT's layout: ``modules_to_save``, trainable tokens, biases, grown embeddings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from luthier.adapters.adapted_module import (
    OwnValue,
    ParameterChange,
    TokenRows,
    adapted_modules,
    base_of,
    change,
)
from luthier.errors import ConfigError, ModelError
from luthier.models import grow

OPTIONS = frozenset({"modules_to_save", "trainable_token_indices", "bias"})
"""The options of ``adapter_config.json`` that are about changed parameters, whatever the method."""
ROWS = ".token_adapter.trainable_tokens_delta"
INSIDE = re.compile(r"\.(token_adapter|base_layer|original_module|modules_to_save)(?=\.)")
"""What PEFT puts into the name of a parameter."""


def train_tokens(model: Any, ids: tuple[int, ...]) -> None:
    """Give the rows of `ids` in the embedding and the output head of `model` values that train.

    Raises:
        ConfigError: The head has an adapter, or a bias, for which PEFT has no form.
    """
    if not ids:
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and (not isinstance(head, nn.Linear) or head.bias is not None):
        raise ConfigError("model.new_tokens: new rows cannot train in an output head that has a bias or an "
                          "adapter; leave it out of adapter.targets, or choose adapter=full")  # fmt: skip
    where = torch.tensor(ids, device=embedding.weight.device)
    weights = {layer.weight: None for layer in (embedding, head) if layer is not None}
    for weight in weights:
        rows = TokenRows(where, weight.detach()[where])
        change(model, [(name, rows) for name in _names_of(model, weight)])


def take_changes(
    model: Any, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]
) -> list[tuple[str, ParameterChange]]:
    """Take what changes whole parameters out of `tensors`, for `change`; grow `model` where it must.

    Raises:
        ModelError: A shape or an id does not fit, or the ids are missing.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(tensors, key=lambda name: not name.endswith(ROWS)):  # rows are above what PEFT resized
        found.setdefault(INSIDE.sub("", name.replace(ROWS, ".weight")), []).append(name)
    if config.get("trainable_token_indices") and not any(name.endswith(ROWS) for name in tensors):
        raise ModelError(f"no tensor ends in {ROWS}, and there are trainable_token_indices")
    changes: list[tuple[str, ParameterChange]] = []
    for own in [name for name, _ in model.named_parameters(remove_duplicate=False)]:
        if own not in found and _listed(config, own):
            raise ModelError(f"{own} is missing, which is in modules_to_save={config['modules_to_save']}")
        for name in found.get(own, ()):
            value = tensors.pop(name)
            if name.endswith(ROWS) and any(own == known for known, _ in changes):
                continue  # PEFT may save those of a tied head too
            made = _change_of(model, config, name, own, value)
            if made is not None:
                changes += [(changed, made) for changed in _changed(model, config, own, made)]
    return changes


def _changed(model: Any, config: Mapping[str, Any], own: str, made: ParameterChange) -> list[str]:
    """Return the names of what `made` changes: the parameter `own`, and what is tied to it and stays so.

    Not tied any more are a module with its own values, rows of a head alone, and rows of other tokens there.
    """
    names = _names_of(model, model.get_parameter(own))
    ids = [_listed_ids(config, name.removesuffix(".weight")) for name in names]
    alone = made.trains if isinstance(made, OwnValue) else any(more not in (None, ids[0]) for more in ids)
    return [own] if alone else names


def _change_of(
    model: Any, config: Mapping[str, Any], name: str, own: str, value: torch.Tensor
) -> ParameterChange | None:
    """Return what the tensor `name` makes of the parameter `own`; None where it is what the base has."""
    if name.endswith(ROWS):
        ids = _ids_of(config, name.removesuffix(ROWS), len(value))
        _fit(model, own, (int(ids.max()) + 1, *value.shape[1:]), name)
        return TokenRows(ids.to(model.get_parameter(own).device), value)
    _fit(model, own, tuple(value.shape), name)
    before, listed = model.get_parameter(own), _listed(config, own)
    biases = own.endswith(".bias") and config.get("bias", "none") != "none"
    trains = biases or (listed and name == own)
    if not trains and (listed or torch.equal(value.to(before), before)):  # of listed ones PEFT may save both
        return None
    return OwnValue(own.rpartition(".")[2], value, trains)


def state_of(model: nn.Module) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the changes of whole parameters as `take_changes` reads them: options and tensors by name."""
    options: dict[str, Any] = {"modules_to_save": [], "trainable_token_indices": {}, "bias": "none"}
    state: dict[str, torch.Tensor] = {}
    seen: set[ParameterChange] = set()
    for place, module in adapted_modules(model).items():
        name = re.sub(r"\.base$", ".base_layer", place)
        whole = name == place and module.changes.keys() == dict(module.base.named_parameters()).keys()
        for changes in map(module.changes_of, module.changes):
            for made, above in zip(changes, [*changes[1:], None], strict=True):
                if isinstance(made, OwnValue | TokenRows) and made not in seen:  # PEFT has tied ones once
                    seen.add(made)
                    inside = f"{name}.{above.below}" if above else name
                    state |= {f"{inside}.{key}": tensor for key, tensor in made.state().items()}
                    made.note(options, inside, whole)
    return options | {"trainable_token_indices": options["trainable_token_indices"] or None}, state


def _names_of(model: nn.Module, parameter: torch.Tensor) -> list[str]:
    """Return every name that `parameter` has in `model`, tied ones too."""
    return [name for name, other in model.named_parameters(remove_duplicate=False) if other is parameter]


def _listed(config: Mapping[str, Any], name: str) -> bool:
    """Whether the parameter `name` is in one of ``modules_to_save``, which PEFT finds by a name's end."""
    modules = [name[: dot.start()] for dot in re.finditer(r"\.", name)]
    return any(module.endswith(last) for module in modules for last in config.get("modules_to_save") or ())


def _listed_ids(config: Mapping[str, Any], place: str) -> Any:
    """Return what ``trainable_token_indices`` has for the module at `place`, which PEFT finds by its end."""
    stored = config.get("trainable_token_indices")
    by_name = stored.items() if isinstance(stored, dict) else [("", stored)]
    return next((ids for name, ids in by_name if place.endswith(name)), None)


def _ids_of(config: Mapping[str, Any], place: str, count: int) -> torch.Tensor:
    stored = _listed_ids(config, place)
    ids = stored if isinstance(stored, list) else []
    whole = all(type(i) is int and 0 <= i < 2**31 for i in ids)
    if not (whole and len(set(ids)) == len(ids) == count):
        raise ModelError(f"trainable_token_indices={stored} are not the ids of the {count} rows of {place}")
    return torch.tensor(ids)


def _fit(model: Any, name: str, shape: tuple[int, ...], what: str) -> None:
    """Grow the embedding of `model` if `name` is its weight or its head's and has fewer rows than `shape`."""
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer]
    if any(model.get_parameter(name) is own for layer in layers for own in base_of(layer).parameters()):
        grow(model, min(shape[0], 2 * len(layers[0].weight)))  # no vocabulary doubles: more is a mistake
    expected = tuple(model.get_parameter(name).shape)
    first = int(what.endswith(ROWS) and shape[0] <= expected[0])  # rows are of some tokens
    if expected[first:] != shape[first:]:
        raise ModelError(f"{what} is {list(shape)}, expected {list(expected)}")
