"""`plan`: what a training run takes and what fits, from shapes alone."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from luthier import config as configs
from luthier.contracts import Quantiser
from luthier.errors import ConfigError
from luthier.runs import as_json, write_json
from luthier.system import in_use, pick_device, pick_dtype
from luthier.trees import Branch, Tree
from luthier_plugins.commands.plan.memory import Counted, Memory, Methods, kernels, memory, passed
from luthier_plugins.commands.plan.ranking import Choice, ranked, setting_of
from luthier_plugins.commands.plan.reference import ReferencePlan, reference_plan
from luthier_plugins.commands.plan.shapes import Sampled, config_of, on_meta
from luthier_plugins.commands.plan.table import show
from luthier_plugins.commands.plan.time import flops_per_token, measured_tflops

CUDA_CONTEXT = 0.5e9
"""Bytes that CUDA takes for itself in a process."""


@dataclass(frozen=True)
class PlanResult:
    """What a run takes.

    Attributes:
        model: What was planned.
        device: ``cpu`` or ``cuda``.
        dtype: What the model computes in.
        methods: Adapter, optimiser, objective and quantiser, by name.
        parameters: Of the model, adapter included; tied ones count once.
        trained: Those that train.
        pack_tokens: Tokens in memory at a time.
        checkpointing: Activations are computed again in the backward pass.
        memory: Bytes by what they are for.
        otherwise: The same with `checkpointing` the other way.
        total: Sum of `memory`, or what the reference's pass holds, if that is more.
        capacity: Bytes of the device; None where it is not known.
        fits: Whether `total` is within it.
        advice: Which knob to turn.
        choices: Every combination of quantiser, adapter and optimiser, the best one first.
        flops_per_token: Floating-point operations, forward and backward.
        tflops: Speed of the device, times the efficiency; None where it is not known.
        tokens: Tokens to train on.
        seconds: Time they take.
        reference: The pass before training, where the objective compares with a reference.
    """

    model: str
    device: str
    dtype: str
    methods: dict[str, str]
    parameters: int
    trained: int
    pack_tokens: int
    checkpointing: bool
    memory: Memory
    otherwise: Memory
    total: float
    capacity: float | None
    fits: bool | None
    advice: str
    choices: tuple[Choice, ...]
    flops_per_token: float
    tflops: float | None
    tokens: float
    seconds: float | None
    reference: ReferencePlan | None = None


def plan(config: DictConfig) -> PlanResult:
    """Plan a run from the shapes of its model, show the plan, and return it.

    Args:
        config: What `luthier.compose("plan", overrides)` returns.

    Raises:
        LuthierError: A model, an option or a combination that cannot be planned; one line says why.
    """
    result = _planned(config)
    show(result)
    if config.json:
        try:
            write_json(Path(config.json), as_json(result))
        except OSError as error:
            raise ConfigError(f"json={config.json} cannot be written: {error.strerror}") from error
    return result


def _planned(config: DictConfig) -> PlanResult:
    model_config, device = config_of(config.model), device_type(config.model.device)
    dtype = _dtype(config.model.dtype, device)
    quantiser: Quantiser | None = configs.build("quantiser", config.quantiser) if config.quantiser else None
    methods = Methods(
        configs.build("adapter", config.adapter),
        configs.build("optimiser", config.optimiser),
        configs.build("objective", config.objective),
        quantiser,
    )
    setting = setting_of(config, dtype, device, methods)
    model = on_meta(model_config, setting.stored)
    counted = Counted.of(Sampled(model), methods.adapter, quantiser)
    sampled, tree = Sampled.of(model), row(config.pack_tokens, len(methods.objective.branch_names))
    baseline = CUDA_CONTEXT if device == "cuda" else (in_use() or 0.0) + kernels(device, dtype)
    settings = [dataclasses.replace(setting, checkpointing=checkpointing) for checkpointing in (False, True)]
    passes = [passed(sampled, [tree], methods.objective, how) for how in settings]
    memories = [
        memory(counted, methods, pack_pass, how, baseline)
        for pack_pass, how in zip(passes, settings, strict=True)
    ]
    now, other = int(setting.checkpointing), int(not setting.checkpointing)
    capacity = _capacity(config, device)
    known = passes[now], counted.dense
    choices = ranked(config, model_config, dtype, device, (baseline, capacity), tree, known)
    flops = flops_per_token(sampled, config.pack_tokens, setting)
    tflops, tokens = _speed(config, device, dtype), _tokens(config)
    reference = None
    if methods.objective.needs_reference:
        reference = reference_plan(config, sampled, memories[now], setting, tree, dtype)
    total = max(memories[now].total, reference.memory if reference else 0.0)
    return PlanResult(
        model=_name(config, model_config),
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        methods={
            kind: str(config[kind].name)
            for kind in ("quantiser", "adapter", "optimiser", "objective")
            if config[kind]
        },
        parameters=counted.parameters,
        trained=counted.trained,
        pack_tokens=config.pack_tokens,
        checkpointing=setting.checkpointing,
        memory=memories[now],
        otherwise=memories[other],
        total=total,
        capacity=capacity,
        fits=None if capacity is None else total <= capacity,
        advice=advice(memories[now], memories[other], total, capacity, choices, setting.checkpointing),
        choices=choices,
        flops_per_token=flops,
        tflops=tflops,
        tokens=tokens,
        seconds=None if tflops is None else tokens * flops / (tflops * 1e12),
        reference=reference,
    )


def _name(config: DictConfig, model_config: Any) -> str:
    path = None if OmegaConf.is_missing(config.model, "path") else config.model.path
    return str(path or config.model.gguf_package or model_config.model_type)


def row(tokens: int, branches: int) -> Tree:
    """Return a tree of `tokens` tokens: a prompt of one with a completion, or several, all supervised."""
    count = min(max(1, branches), max(1, tokens - 1))
    lengths = [max(1, (tokens - 1) // count)] * count
    lengths[0] += max(0, tokens - 1 - sum(lengths))
    return Tree((0,), tuple(Branch((0,) * length) for length in lengths))


def device_type(name: str) -> str:
    """Return ``cpu`` or ``cuda`` for a device that this machine need not have.

    Raises:
        ConfigError: It is neither.
    """
    kind = pick_device("auto").type if name == "auto" else name.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"model.device={name} cannot be planned; expected auto, cpu or cuda")
    return kind


def _dtype(name: str, device: str) -> torch.dtype:
    if name == "auto" and device == "cuda" and not torch.cuda.is_available():
        return torch.bfloat16
    return pick_dtype(name, torch.device(device))


def _capacity(config: DictConfig, device: str) -> float | None:
    if config.memory_gb is not None:
        return float(config.memory_gb) * 1e9
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[1]) if torch.cuda.is_available() else None
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return None


def _speed(config: DictConfig, device: str, dtype: torch.dtype) -> float | None:
    here = device == "cpu" or torch.cuda.is_available()
    raw = config.tflops or (measured_tflops(device, dtype) if here else None)
    return None if raw is None else float(raw * config.efficiency)


def _tokens(config: DictConfig) -> float:
    return float(config.tokens or (config.max_steps or 0) * config.pack_tokens or 1e6)


def advice(
    now: Memory, otherwise: Memory, total: float, capacity: float | None, choices: tuple[Choice, ...],
    checkpointing: bool,
) -> str:  # fmt: skip
    """Return the line that says which knob to turn."""
    if capacity is None:
        return "memory_gb=GB says whether it fits a device"
    if total <= capacity:
        return "nothing needs to change"
    if now.total <= capacity:
        return "a smaller reference.model makes it fit: it is beside the model while it is measured"
    if not checkpointing and otherwise.total <= capacity:
        return "model.gradient_checkpointing=true makes it fit"
    resting = now.total - now.activations - now.workspace - now.retained
    passing = min(now.total, otherwise.total) - resting
    if resting + passing / 4 <= capacity:
        more = "" if checkpointing else " and model.gradient_checkpointing=true"
        return f"a smaller pack_tokens{more} makes it fit"
    if fitting := next((choice for choice in choices if choice.total <= capacity), None):
        return f"{fitting.overrides} makes it fit"
    return "nothing that is installed makes it fit: a smaller model, or more memory"
