"""What measuring a reference takes: one forward pass over every completion, before training begins."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import torch
from omegaconf import DictConfig

from luthier.evaluation import reference_options
from luthier.system import weights_and_autocast
from luthier.trees import Tree
from luthier_plugins.commands.plan.memory import Memory
from luthier_plugins.commands.plan.shapes import Sampled, config_of, on_meta
from luthier_plugins.commands.plan.simulation import Setting, forward_peak
from luthier_plugins.commands.plan.time import flops_per_token


@dataclass(frozen=True)
class ReferencePlan:
    """The pass in which a reference is measured, once.

    Attributes:
        memory: Bytes it holds at its most: the model that will train, and ``reference.model`` beside it.
        flops_per_token: Floating-point operations.
    """

    memory: float
    flops_per_token: float


def reference_plan(
    config: DictConfig, model: Sampled, memory: Memory, setting: Setting, tree: Tree, dtype: torch.dtype
) -> ReferencePlan:
    """Plan the pass of a run of `config`, whose `model` takes `memory` in training.

    Args:
        config: The plan's.
        model: With its adapter.
        memory: Of the run.
        setting: How the run computes.
        tree: What a pack holds.
        dtype: What models compute in.

    Raises:
        ModelError: ``reference.model`` is not there or is no causal language model.
    """
    setting = dataclasses.replace(setting, checkpointing=False)
    beside = 0.0
    if config.reference.model:
        stored, autocast = weights_and_autocast(dtype, train_base=False)
        setting = dataclasses.replace(setting, stored=stored, autocast=autocast)
        model = Sampled.of(on_meta(config_of(reference_options(config)), stored))
        model.model.requires_grad_(False)
        tensors = model.model.state_dict(keep_vars=True)
        unique = {id(tensor): (name, tensor) for name, tensor in tensors.items()}
        beside = sum(float(model.share(name) * tensor.nbytes) for name, tensor in unique.values())
    passing = forward_peak(copy.deepcopy(model.model), [tree], setting)
    held = memory.baseline + memory.weights + memory.adapter + beside
    return ReferencePlan(held + passing, flops_per_token(model, tree.tokens, setting, backward=False))
