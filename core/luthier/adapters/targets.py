"""Which linear layers of a model an adapter changes."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from luthier.adapters.conv1d import is_conv1d
from luthier.errors import ConfigError, nearest

log = logging.getLogger("luthier")
ALL_LINEAR = "all-linear"
_NARROWING = ("exclude_modules", "layers_to_transform", "modules_to_save")
"""Options by which PEFT leaves out some of the ``target_modules``."""
_HEADS = frozenset({"lm_head", "embed_out", "score", "classifier"})
_EMBEDDINGS = re.compile(r"(.*\.)?([^.]*embed[^.]*|wte|wpe)(\..*)?")


def select(model: nn.Module, targets: Any) -> list[str]:
    """Return the names of the linear layers that `targets` means, in the model's order.

    Linear are `nn.Linear`, what inherits it (the quantised layers of bitsandbytes) and transformers' Conv1D;
    not what a model derives from it for something else, such as routers.

    Args:
        model: Any model.
        targets: Suffix names (``["q_proj", "v_proj"]``), a regular expression that matches full names, or
            ``"all-linear"``: every one but the output head.

    Raises:
        ConfigError: A target matches no linear layer, or the head that is tied to the embedding.
    """
    linears = {name: m for name, m in model.named_modules() if _is_linear(m)}
    if targets == ALL_LINEAR:
        head = _head(model)
        names = [name for name, m in linears.items() if m is not head and _last(name) not in _HEADS]
        if not names:
            raise ConfigError(f"targets={ALL_LINEAR}: {type(model).__name__} has no linear layer")
        return names
    if isinstance(targets, str) and targets.isidentifier():
        targets = [targets]
    if not isinstance(targets, str) and not _are_names(targets):
        raise ConfigError(f"targets={targets}: expected names, a regular expression or {ALL_LINEAR}")
    names = _matching(targets, linears) if isinstance(targets, str) else _ending(list(targets), linears)
    if any(linears[name] is _head(model) for name in names) and _tied(model):
        raise ConfigError(f"targets={targets} includes the output head, which is tied to the embedding")
    return names


def select_matrices(matrices: Iterable[str], targets: Any) -> list[str]:
    """Return those of the `matrices`, by module name, that `targets` means, in their order.

    Like `select` where only names are known; ``"all-linear"`` is every one whose name is not that of an
    embedding or an output head.

    Raises:
        ConfigError: A target matches none.
    """
    names: dict[str, Any] = dict.fromkeys(matrices)
    if targets == ALL_LINEAR:
        selection = [name for name in names if is_target(ALL_LINEAR, name)]
        if not selection:
            raise ConfigError(f"targets={ALL_LINEAR}: no matrix of a linear layer trains")
        return selection
    if isinstance(targets, str) and targets.isidentifier():
        targets = [targets]
    if not isinstance(targets, str) and not _are_names(targets):
        raise ConfigError(f"targets={targets}: expected names, a regular expression or {ALL_LINEAR}")
    return _matching(targets, names) if isinstance(targets, str) else _ending(list(targets), names)


def is_target(targets: Any, name: str) -> bool:
    """Return whether `targets`, as `select_matrices` reads them, means the matrix called `name`."""
    if targets == ALL_LINEAR:
        return _last(name) not in _HEADS and not _EMBEDDINGS.fullmatch(name)
    if isinstance(targets, str) and not targets.isidentifier():
        return re.fullmatch(targets, name) is not None
    suffixes = [targets] if isinstance(targets, str) else targets
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def tell_lacking(folder: Any, config: Mapping[str, Any], others: Iterable[str]) -> None:
    """Warn where PEFT would adapt some of the `others`, which have no tensors: some may be lost."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or any(config.get(option) for option in _NARROWING):
        return
    if lacking := sorted(name for name in others if is_target(targets, name)):
        log.warning(
            "%s: %d modules of target_modules, such as %s, have no tensors, and stay as the base has them",
            folder, len(lacking), lacking[0],
        )  # fmt: skip


def matches(pattern: str, name: str) -> bool:
    """Return whether `name` is or ends in `pattern`: a suffix name or regular expression.

    Raises:
        ConfigError: The pattern is no regular expression.
    """
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error as error:
        raise ConfigError(f"'{pattern}' is no regular expression: {error}") from error


def value_for(patterns: Mapping[str, float], name: str, default: float) -> float:
    """Return the value of the first pattern that `name` ends in: a suffix name or regular expression."""
    return next((value for pattern, value in patterns.items() if matches(pattern, name)), default)


def _is_linear(module: nn.Module) -> bool:
    """Whether `module` maps (…, d_in) to (…, d_out); of a model's own kind of layer, shapes tell."""
    if not isinstance(module, nn.Linear) or not type(module).__module__.startswith("transformers.models."):
        return isinstance(module, nn.Linear) or is_conv1d(module)
    weights = {name: weight.to("meta") for name, weight in module.named_parameters()}
    x = torch.empty(1, module.in_features, device="meta", dtype=module.weight.dtype)
    try:
        y = torch.func.functional_call(module, weights, (x,))
    except Exception:  # noqa: BLE001 (whatever it expects, it is no row of a linear layer)
        return False
    return isinstance(y, torch.Tensor) and y.shape == (1, module.out_features)


def _matching(pattern: str, linears: Mapping[str, nn.Module]) -> list[str]:
    try:
        names = [name for name in linears if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ConfigError(f"targets='{pattern}' is no regular expression: {error}") from error
    if not names:
        raise ConfigError(f"targets='{pattern}' fully matches no linear layer: {_hint(pattern, linears)}")
    return names


def _ending(suffixes: list[str], linears: Mapping[str, nn.Module]) -> list[str]:
    if not suffixes:
        raise ConfigError(f"targets=[] chooses nothing: {_hint('', linears)}")
    chosen: set[str] = set()
    for suffix in suffixes:
        names = {name for name in linears if name == suffix or name.endswith(f".{suffix}")}
        if not names:
            raise ConfigError(f"target '{suffix}' matches no linear layer: {_hint(suffix, linears)}")
        chosen |= names
    return [name for name in linears if name in chosen]


def _are_names(targets: object) -> bool:
    return isinstance(targets, Sequence) and all(isinstance(name, str) for name in targets)


def _hint(wanted: str, linears: Mapping[str, nn.Module]) -> str:
    names = sorted({_last(name) for name in linears})
    return f"{nearest(wanted, names)}known: {', '.join(names) or 'none'}, or {ALL_LINEAR}"


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _head(model: nn.Module) -> nn.Module | None:
    from transformers import PreTrainedModel

    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None


def _tied(model: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel) and bool(model.config.tie_word_embeddings)
