"""The models of a merge: transformers folders, runs, adapters; tensors of any of them read lazily."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from luthier.adapters import WEIGHTS, AdaptedLinear, SavedAdapter, adapted_layers, read_adapter
from luthier.errors import ConfigError, LuthierError, ModelError
from luthier.models import adapter_readers, find_source
from luthier_plugins.commands.merge.io.base_model import conv1d_layers
from luthier_plugins.commands.merge.io.folded import changes_parameters, folded
from luthier_plugins.commands.merge.io.hashes import FileHashes
from luthier_plugins.commands.merge.io.weight_files import Checkpoint, Stored, open_checkpoint

WEIGHT = ".weight"
COPY = ".base_layer.weight"
BASE = "base"
"""What the base is called, and no model may be."""
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]


@dataclass(frozen=True)
class MergeInput:
    """A model of a merge.

    Attributes:
        label: What it is called; that of the base is `BASE`.
        checkpoint: The tensors of the model, or of an adapter's base.
        config: Its ``config.json``.
        adapter: What lies on it.
        adapter_folder: Where that comes from, or what is folded into `checkpoint` already.
        origin: Of that: where its base is.
        layers: The layers that it changes.
        conv1d: Those of them that keep their weight (d_in, d_out).
        hashes: Of the files of its weights.
    """

    label: str
    checkpoint: Checkpoint
    config: Mapping[str, Any]
    adapter: SavedAdapter | None = None
    adapter_folder: Path | None = None
    origin: Path | None = None
    layers: frozenset[str] = frozenset()
    conv1d: frozenset[str] = frozenset()
    hashes: FileHashes = field(default_factory=FileHashes)

    @property
    def place(self) -> str:
        """The option that names it."""
        return place_of(self.label)

    @property
    def folder(self) -> Path:
        """Where it comes from, its tokenizer too."""
        return self.adapter_folder or self.checkpoint.folder

    @property
    def ground(self) -> Path:
        """Where the model is that it is an adapter of, or itself."""
        return self.origin or self.checkpoint.folder

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """Its tensors."""
        return self.checkpoint.tensors

    @property
    def weight_files(self) -> list[Path]:
        """Every file that its weights come from."""
        own = [] if self.adapter_folder is None else [self.adapter_folder / WEIGHTS]
        return [*self.checkpoint.files, *own]

    def adapts(self, name: str) -> bool:
        """Whether the adapter changes the tensor `name`."""
        return name.removesuffix(WEIGHT) in self.layers if name.endswith(WEIGHT) else False

    def transposes(self, name: str) -> bool:
        """Whether the adapter changes the tensor `name`, and that is (d_in, d_out)."""
        return name.removesuffix(WEIGHT) in self.conv1d

    @torch.no_grad()
    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return elements of a tensor in fp32, (stop − start,); what the adapter changes is read whole."""
        if self.adapts(name):
            merged = self.layer(name).merged_weight()
            return (merged.T if self.transposes(name) else merged).reshape(-1)[start:stop]
        return self.checkpoint.read(name, start, stop).float()

    def layer(self, name: str) -> AdaptedLinear:
        """Return the adapted layer whose weight is the tensor `name`, the base's weight in fp32 in it."""
        assert self.adapter is not None
        module = name.removesuffix(WEIGHT)
        stored = self.tensors[name]
        weight = self.checkpoint.read(name).float().view(stored.shape)
        root = nn.Module()
        _put(root, module, _linear(weight, self.transposes(name)))
        try:
            self.adapter.method(module).attach(root, torch.Generator())
            self.adapter.method(module).load_state(root, self.adapter.of(module))
        except LuthierError as error:
            raise type(error)(f"{self.place}: {self.adapter_folder}: {error}") from error
        return adapted_layers(root)[module]


def place_of(label: str) -> str:
    """Return the option that names the model called `label`."""
    return label if label == BASE else f"models.{label}"


def _linear(weight: torch.Tensor, transposed: bool) -> nn.Module:
    """Return a layer without bias that has `weight`; Conv1D keeps it the other way round."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        layer: nn.Module = (
            Conv1D(weight.shape[1], weight.shape[0])
            if transposed
            else nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        )
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if transposed:
        layer.bias = nn.Parameter(torch.zeros(weight.shape[1]), requires_grad=False)
    return layer


def _put(root: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` under its dotted name into `root`, which has nothing else."""
    *path, last = name.split(".")
    for part in path:
        child = nn.Module()
        root.add_module(part, child)
        root = child
    root.add_module(last, layer)


def labelled(models: Any) -> dict[str, str]:
    """Return label → path of the option ``models``: a mapping, or a list whose labels are the folders' names.

    Raises:
        ConfigError: It is neither, or two models of a list have the same name.
    """
    if isinstance(models, Mapping):
        paths = {"" if label is None else str(label): path for label, path in models.items()}
    elif isinstance(models, list | tuple):
        paths = {}
        for path in models:
            label = _label(str(path))
            if label in paths:
                raise ConfigError(
                    f"models: {paths[label]} and {path} would both be called {label}; give them names: "
                    "'models={one: FOLDER, two: FOLDER}'"
                )
            paths[label] = path
    else:
        raise ConfigError(f"models={models!r}: expected '[FOLDER, FOLDER]' or '{{one: FOLDER, two: FOLDER}}'")
    if not paths or not all(isinstance(path, str) and path for path in paths.values()):
        raise ConfigError("models is empty: expected '[FOLDER, FOLDER]' or '{one: FOLDER, two: FOLDER}'")
    for label in paths:
        if label == BASE or not label.isprintable() or not label.strip():
            raise ConfigError(
                f"models: {label!r} cannot be a model's name; give another: '{{one: FOLDER, two: FOLDER}}'"
            )
    return paths


def _label(path: str) -> str:
    place = Path(path)
    place = place if place.name not in ("", "..") else place.resolve()
    return place.parent.name if place.name == "model" and place.parent.name else place.name


def open_input(label: str, path: str, work: Path) -> MergeInput:
    """Open the model that a person calls `path`; below `work` it is folded where it must be.

    Raises:
        ModelError: It is not there, or cannot be merged; the message names it.
    """
    try:
        source = find_source(SimpleNamespace(path=path, gguf_package=None, adapter=None))
        checkpoint = open_checkpoint(_local(source.base))
        config = _config(checkpoint.folder / "config.json")
        if config.get("quantization_config"):
            raise ModelError(f"{checkpoint.folder} is quantised; merge its original in full precision")
        if source.adapter is None:
            return MergeInput(label, checkpoint, config, hashes=FileHashes(checkpoint.files))
        if changes_parameters(source.adapter):
            origin = checkpoint.folder
            checkpoint.close()
            checkpoint = open_checkpoint(folded(source, work))
            config = _config(checkpoint.folder / "config.json")
            hashes = FileHashes([*checkpoint.files, source.adapter / WEIGHTS])
            return MergeInput(
                label, checkpoint, config, adapter_folder=source.adapter, origin=origin, hashes=hashes
            )
        adapter = read_adapter(source.adapter, adapter_readers(), _modules(checkpoint))
        adapter = _checked(source.adapter, adapter, checkpoint)
        layers = frozenset(adapter.layers)
        conv1d = layers & conv1d_layers(checkpoint.folder, config)
    except LuthierError as error:
        raise type(error)(f"{place_of(label)}: {error}") from error
    hashes = FileHashes([*checkpoint.files, source.adapter / WEIGHTS])
    model = MergeInput(label, checkpoint, config, adapter, source.adapter, None, layers, conv1d, hashes)
    if layers:
        # What attaching imports shall be in memory before anyone looks how much of that is free.
        model.layer(min((name + WEIGHT for name in layers), key=lambda name: model.tensors[name].count))
    return model


def _config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is missing or damaged: {error}; copy the model again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} is damaged: expected a table of options")
    return config


def _checked(folder: Path, adapter: SavedAdapter, base: Checkpoint) -> SavedAdapter:
    """Leave out the base's own weights, which PEFT saves beside adapters of embeddings and output heads."""
    kept = {}
    for name, tensor in adapter.tensors.items():
        if not name.endswith(COPY):
            kept[name] = tensor
        elif not torch.equal(tensor.view(-1), base.read(name.removesuffix(COPY) + WEIGHT).to(tensor.dtype)):
            raise ModelError(
                f"{folder}: {name} is not the base's weight; fold this adapter with the base it was trained "
                "on, and merge the result"
            )
    return replace(adapter, tensors=kept)


def _modules(checkpoint: Checkpoint) -> set[str]:
    return {name.removesuffix(WEIGHT) for name in checkpoint.tensors if name.endswith(WEIGHT)}


def _local(base: str) -> Path:
    """Return the folder of a checkpoint, fetched from the hub where it is not here."""
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base, allow_patterns=_WANTED))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{base} is neither a folder here nor a name the Hugging Face hub gives us now; check the "
            "spelling and the connection"
        ) from error
