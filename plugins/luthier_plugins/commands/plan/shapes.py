"""A model of shapes alone, on the meta device: from its config, never from its weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING

from luthier.contracts import Adapter, Quantiser
from luthier.errors import ModelError, nearest
from luthier.models import find_source, load_config, quiet

_NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers")
SAMPLE = 3
"""Layers of a kind that stand for all of it: the difference between two and three is one layer's share."""


def config_of(model: Any) -> Any:
    """Return the transformers config that the `ModelConfig` `model` names: of its shape, if it has one.

    Raises:
        ConfigError: No model is named.
        ModelError: The shape or the config lacks something, which is named; or the model is not there.
    """
    if model.shape:
        shape: Any = OmegaConf.to_container(OmegaConf.create(model.shape))
        return _from_shape(shape)
    folder = Path(model.path or "").expanduser()
    if model.path and not model.gguf_package and (folder / "config.json").is_file():
        return load_config(str(folder))  # its weights may be elsewhere
    return load_config(find_source(model).base, model.revision)


def _from_shape(shape: dict[str, Any]) -> Any:
    kind = str(shape.pop("model_type", ""))
    if kind not in CONFIG_MAPPING:
        what = f"transformers knows no model_type '{kind}'" if kind else "it lacks model_type"
        raise ModelError(f"model.shape: {what}; {nearest(kind, CONFIG_MAPPING)}e.g. llama, qwen3, gemma2")
    cls = CONFIG_MAPPING[kind]
    names = dict(cls.attribute_map)
    known = {*names, *cls().to_dict()}
    for key in sorted(shape.keys() - known):
        raise ModelError(f"model.shape: {kind} has no '{key}'; {nearest(key, known)}see its config class")
    for key in _NEEDED:
        if not {key, names.get(key)} & shape.keys():
            raise ModelError(f"model.shape lacks {key}, which a plan of {kind} needs")
    try:
        with quiet():
            return cls(**shape)
    except Exception as error:  # a config class validates in its own ways
        raise ModelError(f"model.shape: {kind} refuses it: {error}") from error


def on_meta(model_config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Return the causal language model of `model_config` without weights.

    Raises:
        ModelError: transformers cannot build it; the message says what is missing.
    """
    plain = copy.deepcopy(model_config)
    vars(plain).pop("quantization_config", None)  # what a quantiser adds is counted by its class
    try:
        with quiet(), torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                plain, dtype=dtype, trust_remote_code=False
            )
    except Exception as error:  # a model's own code may fail in any way
        kind = getattr(plain, "model_type", None) or type(plain).__name__
        said = " ".join(str(error).split())
        raise ModelError(
            f"transformers builds no causal language model of model_type '{kind}': {said[:200]}"
        ) from error
    return model


class QuantisedShape(nn.Linear):
    """The shape of a quantised linear layer: its dense weight lives only while it is multiplied with."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(
            like.in_features, like.out_features, like.bias is not None, "meta", like.weight.dtype
        )
        self.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        """Map (…, d_in) to (…, d_out)."""
        y: Tensor = _Dequantised.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return y


class _Dequantised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return nn.functional.linear(x, torch.empty_like(weight, dtype=x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return grad @ torch.empty_like(weight, dtype=grad.dtype), None, None


def quantise(model: PreTrainedModel, quantiser: Quantiser) -> None:
    """Replace the linear layers that `quantiser` quantises by their shapes, in place."""
    head = model.get_output_embeddings()
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    chosen = [name for name, layer in linears.items() if layer is not head and quantiser.quantises(name)]
    for name in chosen:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, QuantisedShape(linears[name]))


class _Undrawn(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Leaves tensors that are drawn at random as they are: of an adapter's start only the shapes matter."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        in_place = func._schema.name.endswith("_")
        if in_place and torch.Tag.nondeterministic_seeded in func.tags:
            return args[0]
        return func(*args, **(kwargs or {}))


def attach(model: nn.Module, adapter: Adapter) -> None:
    """Attach `adapter` to a `model` of shapes, in place.

    Raises:
        ConfigError: Its options do not fit the model.
    """
    model.requires_grad_(True)
    with _Undrawn():  # type: ignore[no-untyped-call]
        adapter.attach(model, torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Sampled:
    """A model whose alike layers are represented by a few of them.

    Attributes:
        model: With at most three layers of a kind.
        layers: Name of its list of layers; None where there is none, and the model is whole.
        stands_for: How many layers every one in the list stands for.
    """

    model: PreTrainedModel
    layers: str | None = None
    stands_for: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: PreTrainedModel) -> Sampled:
        """Copy `model` with its first layers of every kind; the whole of it where no layers are found."""
        count = model.config.get_text_config().to_dict().get("num_hidden_layers")
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        name = next((candidate for candidate in lists if len(_list(model, candidate)) == count), None)
        if name is None:
            return cls(copy.deepcopy(model))
        stands = {
            place: len(group) - SAMPLE + 1 if number == SAMPLE - 1 else 1
            for group in _kinds(model, _list(model, name))
            for number, place in enumerate(group[:SAMPLE])
        }
        chosen = sorted(stands)
        return cls(_with_layers(model, name, chosen), name, tuple(stands[place] for place in chosen))

    def copied(self) -> Sampled:
        """Return a copy, to be changed."""
        return Sampled(copy.deepcopy(self.model), self.layers, self.stands_for)

    def without(self, place: int) -> Sampled:
        """Return a copy without the layer at `place`."""
        assert self.layers is not None
        others = [other for other in range(len(self.stands_for)) if other != place]
        left = tuple(self.stands_for[other] for other in others)
        return Sampled(_with_layers(self.model, self.layers, others), self.layers, left)

    def sampled(self) -> list[nn.Module]:
        """Return the layers, in order."""
        return [] if self.layers is None else list(_list(self.model, self.layers))

    def share(self, tensor: str) -> int:
        """Return how many tensors of the whole model the one called `tensor` stands for."""
        prefix = f"{self.layers}."
        inner = self.layers is not None and tensor.startswith(prefix)
        return self.stands_for[int(tensor[len(prefix) :].split(".")[0])] if inner else 1


def _list(model: nn.Module, name: str) -> nn.ModuleList:
    layers = model.get_submodule(name)
    assert isinstance(layers, nn.ModuleList)
    return layers


def _kinds(model: PreTrainedModel, layers: nn.ModuleList) -> list[list[int]]:
    """Return the places of `layers`, alike ones together: the same modules, shapes and kind of attention."""
    types = model.config.get_text_config().to_dict().get("layer_types") or [None] * len(layers)
    groups: dict[Any, list[int]] = {}
    for place, (layer, kind) in enumerate(zip(layers, types, strict=False)):
        tensors = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
        groups.setdefault((type(layer), kind, tensors), []).append(place)
    return list(groups.values())


def _with_layers(model: PreTrainedModel, name: str, chosen: list[int]) -> PreTrainedModel:
    parent, _, child = name.rpartition(".")
    owner, layers = model.get_submodule(parent), _list(model, name)
    try:
        setattr(owner, child, nn.ModuleList([layers[place] for place in chosen]))
        return copy.deepcopy(model)
    finally:
        setattr(owner, child, layers)
