"""Adapters in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``, both directions."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from luthier.adapters.adapted_module import change
from luthier.adapters.peft_changes import OPTIONS, state_of, take_changes
from luthier.adapters.targets import tell_lacking
from luthier.contracts import Adapter
from luthier.errors import ConfigError, ModelError, unknown
from luthier.models import TASKS, head_name, head_of, load_head, peft_kind
from luthier.system import read_table, written_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
HEADS = ("score", "classifier")
"""What transformers' classes call their heads."""
# Options that say nothing the tensors' names and shapes do not, or only how training began.
_HARMLESS = OPTIONS | {
    "peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode",
    "auto_mapping", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "fan_in_fan_out", "megatron_core", "qalora_group_size", "eva_config", "loftq_config",
}  # fmt: skip


class PeftAdapter(Adapter):
    """An adapter with a form in PEFT's layout.

    Attributes:
        peft_options: The options of ``adapter_config.json`` that `from_peft` understands.
        peft_shared: Tensors that belong to the adapter as a whole and to no module, by their full name in
            PEFT's file (``base_model.projection``); `state` and `load_state` call them that.
    """

    peft_options: ClassVar[frozenset[str]] = frozenset()
    peft_shared: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    @abstractmethod
    def from_peft(cls, config: Mapping[str, Any]) -> PeftAdapter:
        """Return the adapter that `config` describes; its ``target_modules`` are full module names."""

    @abstractmethod
    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """Return the options of ``adapter_config.json`` that this adapter sets, ``target_modules`` too."""

    @abstractmethod
    def state(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Return the adapter's tensors by module name and PEFT's suffix (``….q_proj.lora_A.weight``)."""

    @abstractmethod
    def load_state(self, model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        """Copy what `state` returned into the attached adapter.

        Raises:
            ModelError: A tensor is missing, left over or of another shape.
        """

    @classmethod
    def load(cls, model: nn.Module, folder: Path, trainable: bool) -> PeftAdapter:
        """See `load_adapter`."""
        assert cls.peft_kind is not None
        return load_adapter(model, folder, {cls.peft_kind: cls}, trainable)

    def save(self, model: nn.Module, folder: Path, base: str) -> None:
        """Write a PEFT folder that peft, transformers and vLLM load on `base`, and read it back.

        Raises:
            ModelError: What was read back differs.
        """
        assert self.peft_kind is not None
        kind, *flags = self.peft_kind.split("+")
        task, beside = _beside(model)
        options, changes = state_of(model)
        heads = {name.partition(".")[0] for name in beside}
        config = {
            "peft_type": kind,
            "task_type": task,
            "base_model_name_or_path": base,
            "revision": None,
            "inference_mode": True,
            **options,
            "modules_to_save": [*options["modules_to_save"], *heads] or None,
            **dict.fromkeys(flags, True),
            **self.peft_config(model),
        }
        tensors = {
            name if name in self.peft_shared else PREFIX + name: tensor.contiguous()
            for name, tensor in (self.state(model) | beside | changes).items()
        }
        with written_whole(folder) as fresh:
            (fresh / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            save_file(tensors, fresh / WEIGHTS, metadata={"format": "pt"})
            back = load_file(fresh / WEIGHTS)
            if wrong := [name for name in tensors if not torch.equal(tensors[name].cpu(), back[name])]:
                raise ModelError(f"{folder}: {wrong[0]} reads back differently")


def load_adapter(
    model: nn.Module, folder: Path, adapters: Mapping[str, type[Adapter]], trainable: bool
) -> PeftAdapter:
    """Attach the adapter saved in `folder` to `model`, and return it.

    Which modules it changes follows from the tensors' names, so every way PEFT has of choosing targets is
    understood.

    Args:
        model: The base model.
        folder: What PEFT or Luthier saved.
        adapters: Adapter classes by PEFT kind.
        trainable: Whether the adapter's weights go on training.

    Raises:
        ModelError: The folder is incomplete or pickled, has options nobody here understands, or does not
            fit the model.
    """
    config, tensors = _read(folder)
    head = _head(model, config, tensors)
    known = {name for name, _ in model.named_modules() if name}
    kind = _kind(folder, config, adapters)
    try:
        changes = take_changes(model, config, tensors)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error
    saved = _saved(folder, config, tensors, kind, known, type(model).__name__)
    try:
        adapter = saved.method(*saved.layers)
        adapter.attach(model, torch.Generator())
        adapter.load_state(model, tensors)
        change(model, changes)
        if head is not None:
            load_head(model, *head)
    except (ConfigError, ModelError) as error:
        raise ModelError(f"{folder}: {error}") from error
    if not trainable:
        model.requires_grad_(False)
    return adapter


@dataclass(frozen=True)
class SavedAdapter:
    """What a PEFT folder holds, before it is on a model.

    Attributes:
        cls: The adapter class that reads it.
        config: ``adapter_config.json``.
        tensors: By module name and suffix, as `PeftAdapter.state` has them.
        layers: The modules it changes.
    """

    cls: type[PeftAdapter]
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    layers: tuple[str, ...]

    def method(self, *layers: str) -> PeftAdapter:
        """Return the adapter for `layers` alone.

        Raises:
            ConfigError, ModelError: Its options cannot be used.
        """
        return self.cls.from_peft({**self.config, "target_modules": list(layers)})

    def of(self, layer: str) -> dict[str, torch.Tensor]:
        """Return the tensors of `layer`, and those that all layers share."""
        mine = (f"{layer}.", *self.cls.peft_shared)
        return {name: tensor for name, tensor in self.tensors.items() if name.startswith(mine)}


def read_adapter(
    folder: Path, adapters: Mapping[str, type[Adapter]], modules: Collection[str]
) -> SavedAdapter:
    """Read the adapter saved in `folder`, which lies on a model of these modules.

    Raises:
        ModelError: The folder is incomplete or pickled, has options nobody here understands, belongs to
            another model, or has a head of its own.
    """
    config, tensors = _read(folder)
    if config.get("task_type") in TASKS.values():
        raise ModelError(f"{folder}: it is a reward model, whose head no other has; expected an adapter of a "
                         "language model")  # fmt: skip
    return _saved(folder, config, tensors, _kind(folder, config, adapters), modules, "the base model")


def _saved(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    cls: type[PeftAdapter],
    modules: Collection[str],
    model: str,
) -> SavedAdapter:
    own = [name for name in tensors if name not in cls.peft_shared]
    layers = tuple(_modules(folder, modules, own, model))
    tell_lacking(folder, config, set(modules) - set(layers))
    return SavedAdapter(cls, config, tensors, layers)


def _kind(
    folder: Path, config: Mapping[str, Any], adapters: Mapping[str, type[Adapter]]
) -> type[PeftAdapter]:
    """Return the one of `adapters` that reads what `config` describes; all its options are understood."""
    kind = peft_kind(config)
    if kind not in adapters:
        raise ModelError(f"{folder}: {unknown('PEFT kind', kind, adapters)}")
    cls = adapters[kind]
    if not issubclass(cls, PeftAdapter):
        raise ModelError(
            f"{folder}: {cls.__name__} reads it in a way of its own, so it cannot be taken apart"
        )
    _refuse(folder, config, cls.peft_options)
    return cls


def _beside(model: nn.Module) -> tuple[str, dict[str, torch.Tensor]]:
    """Return PEFT's name of what `model` is for, and the tensors of its head by their name in its class."""
    head = head_of(model)
    if head is None or head.kind not in TASKS:
        return "CAUSAL_LM", {}
    name = head_name(cast("PreTrainedModel", model), head.kind)
    return TASKS[head.kind], {f"{name}.{key}": tensor for key, tensor in head.state_dict().items()}


def _head(
    model: nn.Module, config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> tuple[str, dict[str, torch.Tensor]] | None:
    """Take the head out of what a folder holds: its kind and tensors; None for a language model's folder."""
    kind = next((kind for kind, task in TASKS.items() if config.get("task_type") == task), None)
    if kind is None:
        return None
    name = head_name(cast("PreTrainedModel", model), kind)
    # PEFT lists every name that a head may have.
    config["modules_to_save"] = [part for part in config.get("modules_to_save") or () if part not in HEADS]
    mine = [key for key in tensors if key.startswith(f"{name}.")]
    return kind, {key.removeprefix(f"{name}."): tensors.pop(key) for key in mine}


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder} holds no {CONFIG}; expected a PEFT folder")
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        contents = "only adapter_model.bin, which can run code when loaded" if pickled else "no weights"
        raise ModelError(f"{folder} holds {contents}; expected {WEIGHTS}: save it again with peft >= 0.10")
    config = read_table(folder / CONFIG)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (ValueError, SafetensorError) as error:
        raise ModelError(f"{folder} is damaged: {error}") from error
    for key in ("modules_to_save", "target_parameters"):
        if not (isinstance(names := config.get(key) or [], list) and all(isinstance(n, str) for n in names)):
            raise ModelError(f"{folder}: {CONFIG} has {key}={names!r}; expected a list of names")
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() and tensor.float().isfinite().all()):
            raise ModelError(f"{folder}: {name.removeprefix(PREFIX)} is not of finite floating-point numbers")
    return config, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def _refuse(folder: Path, config: Mapping[str, Any], understood: frozenset[str]) -> None:
    for key, value in config.items():
        if not (not value or key in _HARMLESS or key in understood or key.startswith("use_")):
            raise ModelError(f"{folder}: {CONFIG} has {key}={value!r}, which Luthier does not support; "
                             "train the adapter without it, or merge it into its base with peft")  # fmt: skip


def _modules(folder: Path, known: Collection[str], tensors: Collection[str], model: str) -> list[str]:
    """Return the modules that `tensors` belong to: the longest part of each name that is a known one."""
    modules = set()
    for name in tensors:
        parts = name.split(".")
        prefixes = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
        module = next((prefix for prefix in prefixes if prefix in known), None)
        if module is None:
            raise ModelError(f"{folder}: '{name}' belongs to no module of {model}; "
                             "was the adapter trained on another model?")  # fmt: skip
        modules.add(module)
    return sorted(modules)
