"""Low-rank updates of embeddings and experts beside those of linear layers, as PEFT has them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import nn

from luthier import copy_state, is_conv1d, refuse_adapted
from luthier.adapters import ALL_LINEAR, adapted_layers, adapted_modules, change, peft_targets
from luthier.errors import ConfigError, nearest
from luthier_toolkits.low_rank.low_rank_adapter import LowRankAdapter, stacks
from luthier_toolkits.low_rank.low_rank_change import LowRankChange

log = logging.getLogger("luthier")


class LowRankParameters(LowRankAdapter):
    """A `LowRankAdapter` that changes embeddings, and parameters of any module, as well.

    Attributes:
        targets: See `LowRankAdapter`; a list may have names of embeddings.
        target_parameters: Names of parameters, in full or their ends (``mlp.experts.down_proj``): stacks of
            experts or single matrices.
    """

    peft_options: ClassVar[frozenset[str]] = LowRankAdapter.peft_options | {"target_parameters"}
    target_parameters: list[str]

    def attach(self, model: nn.Module, generator: torch.Generator) -> None:
        """Freeze `model`, wrap the linear targets and change the others.

        Raises:
            ConfigError: A target matches nothing or cannot be changed, or an adapter is there already.
        """
        refuse_adapted(model)
        linear, others = self._chosen(model)
        if linear:
            LowRankAdapter.attach(dataclasses.replace(cast(Any, self), targets=linear), model, generator)
        changes = [(name, self._change(name, module, generator)) for name, module in others.items()]
        if not linear:
            model.requires_grad_(False)
        change(model, changes)
        if self.targets == ALL_LINEAR:
            _name_left_out(model)

    def _chosen(self, model: nn.Module) -> tuple[Any, dict[str, nn.Module]]:
        """Return the targets that are linear layers, and the other parameters by name with their modules."""
        linear: Any = self.targets
        others: dict[str, nn.Module] = {}
        if isinstance(linear, list | tuple):
            for name, module in model.named_modules():
                if isinstance(module, nn.Embedding) and any(_ends(name, target) for target in linear):
                    others[f"{name}.weight"] = module
            named = {name.rpartition(".")[0] for name in others}
            linear = [target for target in linear if not any(_ends(name, target) for name in named)]
        for target in self.target_parameters:
            found = {name: module for name, module in _parameters(model) if _ends(name, target)}
            if not found:
                known = sorted({_short(name) for name, m in _parameters(model) if not _is_linear(m)})
                raise ConfigError(f"target_parameters: '{target}' is the end of no parameter's name: "
                                  f"{nearest(target, known)}known: {', '.join(known) or 'none'}")  # fmt: skip
            for name, module in found.items():
                if not _is_linear(module):
                    others[name] = module
                elif isinstance(linear, list) and isinstance(module, nn.Linear):  # quantised ones too
                    linear.append(name.rpartition(".")[0])
                else:
                    raise ConfigError(f"target_parameters: {name} is a linear layer's; name that in targets")
        order = [name for name, _ in _parameters(model)]
        return linear, {name: others[name] for name in sorted(others, key=order.index)}

    def _change(self, name: str, module: nn.Module, generator: torch.Generator) -> LowRankChange:
        weight = module.get_parameter(name.rpartition(".")[2])
        embedding = isinstance(module, nn.Embedding)
        if weight.dim() not in (2, 3) or not weight.is_floating_point():
            raise ConfigError(
                f"{name} {list(weight.shape)}, {weight.dtype}, is no matrix, or stack of matrices, of "
                "floating-point numbers, and can have no low-rank update"
            )
        # Which way round a family keeps its experts is an attribute that most, but not all, have.
        transposed = embedding or (weight.dim() == 3 and bool(vars(module).get("is_transposed")))
        looked_up = name.removesuffix(".weight") if embedding else name
        made = LowRankChange(weight, *self.rank_and_scale_of(looked_up), embedding, transposed)
        made.start(generator)
        return made

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """See `LowRankAdapter.peft_config`; what peft would take for experts is told to it as parameters.

        Those need a dropout of 0 there.
        """
        changed, layers = dict(_changes(model)), adapted_layers(model)
        renamed = self.renamed(model)
        kept = {name: layer for name, layer in layers.items() if name not in renamed}
        embeddings = [name.removesuffix(".weight") for name, made in changed.items() if made.embedding]
        parameters = [name for name, made in changed.items() if not made.embedding]
        parameters += [f"{name}.weight" for name in renamed]
        config = super().peft_config(model)
        config["target_modules"] = [*(peft_targets(model, kept) if kept else ()), *embeddings]
        if parameters:
            config |= {"target_parameters": sorted(parameters), "lora_dropout": 0.0}
        return config

    def patterned(self, model: nn.Module) -> dict[str, str]:
        """See `LowRankAdapter.patterned`."""
        layers = super().patterned(model)
        changed = [name.removesuffix(".weight") if made.embedding else name for name, made in _changes(model)]
        renamed = {f"{name}.weight": name for name in self.renamed(model)}
        return layers | renamed | {name: name for name in changed}

    def tell_renamed(self, layers: list[str]) -> None:
        """Nothing: as parameters peft finds them."""

    def state(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Return the tensors of linear layers and of changed parameters by PEFT's names."""
        tensors = {f"{place}.{key}": t for place, made in _placed(model) for key, t in made.state().items()}
        return super().state(model) | tensors

    def load_state(self, model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        """Copy all of them in.

        Raises:
            ModelError: A tensor is missing, left over or of another shape.
        """
        own = {f"{place}.{key}": t for place, made in _placed(model) for key, t in made.tensors().items()}
        copy_state(own, {name: tensor for name, tensor in state.items() if name in own})
        super().load_state(model, {name: tensor for name, tensor in state.items() if name not in own})

    @staticmethod
    def options_from_peft(config: Mapping[str, Any]) -> dict[str, Any]:
        """See `LowRankAdapter.options_from_peft`; of target parameters those of these layers are taken."""
        options = LowRankAdapter.options_from_peft(config)
        parameters = [
            name
            for layer in options["targets"]
            for target in sorted(config.get("target_parameters") or ())
            if _ends(name := f"{layer}.{target.rpartition('.')[2]}", target)
        ]
        owners = {name.rpartition(".")[0] for name in parameters}
        layers = [layer for layer in options["targets"] if layer not in owners]
        return options | {"targets": layers, "target_parameters": parameters}


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _short(name: str) -> str:
    """Return the end of a parameter's name that is the same in every layer."""
    return ".".join(name.split(".")[-3:])


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the name of every parameter of two or more dimensions, with its module, in the model's order."""
    for place, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                yield f"{place}.{name}", module


def _changes(model: nn.Module) -> Iterator[tuple[str, LowRankChange]]:
    """Yield every low-rank change by the name of its parameter."""
    for place, module in adapted_modules(model).items():
        for name in module.changes:
            made = [change for change in module.changes_of(name) if isinstance(change, LowRankChange)]
            yield from ((f"{place}.{name}", change) for change in made)


def _placed(model: nn.Module) -> Iterator[tuple[str, LowRankChange]]:
    """Yield every low-rank change by the place of its tensors in PEFT's file.

    PEFT wraps a module once for each parameter, the first of them innermost.
    """
    by_module: dict[str, list[LowRankChange]] = {}
    for name, made in _changes(model):
        by_module.setdefault(name.rpartition(".")[0], []).append(made)
    for place, changes in by_module.items():
        for depth, made in enumerate(reversed(changes)):
            yield place + ".base_layer" * depth, made


def _name_left_out(model: nn.Module) -> None:
    """Say which stacks of experts nothing trains."""
    trained = {name for name, _ in _changes(model)}
    left = [name for name in stacks(model) if name.replace(".base.", ".") not in trained]
    if left:
        names = ",".join(sorted({_short(name) for name in left}))
        log.warning(
            "experts that nothing trains: %d stacks, such as %s; adapter.target_parameters=[%s] with "
            "adapter.dropout=0 trains them", len(left), left[0], names,
        )  # fmt: skip
