"""What a run is going to take, said before its first step: beside the measured peak, in its summary."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence

import torch

from luthier.data import Batches, RowBatches, Sampler
from luthier.engine import TrainingRun
from luthier.kernels import is_wide
from luthier.models import LoadedModel
from luthier.system import Processes, in_use
from luthier.trees import Tree, cut
from luthier_plugins.commands.plan.memory import Counted, Methods, kernels, memory, passed
from luthier_plugins.commands.plan.shapes import Sampled, on_meta
from luthier_plugins.commands.plan.simulation import Setting

log = logging.getLogger("luthier")

LOOKED_AT = 50
"""Steps whose packs are looked at for the largest one."""


def forecast(
    run: TrainingRun, batches: Batches, optimiser: torch.optim.Optimizer, total_steps: int
) -> float | None:
    """Answer the hook `forecast_memory`."""
    if not isinstance(batches, RowBatches):
        log.info("memory is not predicted: answers have no length before they are made")
        return None
    methods = Methods(run.adapter, run.optimiser, run.objective, run.quantiser)
    options = run.config.model.fused, run.config.model.gradient_checkpointing
    packs = packs_of(batches.trees, batches.sampler, total_steps, run.config.pack_tokens)
    return predicted(run.loaded, methods, options, packs, run.processes, optimiser)


def predicted(
    loaded: LoadedModel,
    methods: Methods,
    options: tuple[bool, bool],
    steps: Sequence[Sequence[Sequence[Tree]]],
    processes: Processes,
    optimiser: torch.optim.Optimizer,
) -> float | None:
    """Return the memory of training in MiB; None, with the reason logged, where it cannot be planned.

    What the process holds beside the model is read, as it is now; all else is planned from shapes.

    Args:
        loaded: The model, its adapter attached.
        methods: The run's methods.
        options: Whether frozen parts are fused, and whether activations are computed again.
        steps: Packs of some steps.
        processes: The run's processes.
        optimiser: With the states it has so far: those of a resumed run.
    """
    used = 0.0 if loaded.device.type == "cuda" else in_use()
    if processes.count > 1 or used is None:
        why = "this system does not say what a process uses" if used is None else "several processes"
        log.info("memory is not predicted: %s", why)
        return None
    states = itertools.chain.from_iterable(state.values() for state in optimiser.state.values())
    there = sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
    try:
        return _planned(loaded, methods, options, steps, used - there) / 2**20
    except Exception as error:  # noqa: BLE001 - a prediction is never worth a run
        log.info("memory is not predicted: %s: %s", type(error).__name__, error)
        return None


def _planned(
    loaded: LoadedModel,
    methods: Methods,
    options: tuple[bool, bool],
    steps: Sequence[Sequence[Sequence[Tree]]],
    used: float,
) -> float:
    stored = torch.float32 if loaded.autocast_dtype else loaded.dtype
    fused, checkpointing = options
    several, frees = any(len(packs) > 1 for packs in steps), methods.optimiser.steps_in_backward
    autocast = loaded.autocast_dtype
    wide = is_wide(loaded.model)
    setting = Setting(loaded.device.type, stored, autocast, fused, checkpointing, several, frees, wide)
    whole = Sampled(on_meta(loaded.model.config, stored))
    counted = Counted.of(whole, methods.adapter, methods.quantiser)
    packs = [pack for step in steps for pack in step]
    largest = max(packs, key=lambda pack: sum(tree.tokens for tree in pack))
    pack_pass = passed(Sampled.of(whole.model), largest, methods.objective, setting)
    beside = max(0.0, used - counted.weights - counted.adapter)
    sizes = {sum(tree.tokens for tree in pack) for pack in packs}
    beside += kernels(loaded.device.type, loaded.dtype, len(sizes))
    return memory(counted, methods, pack_pass, setting, beside).in_use


def packs_of(trees: Sequence[Tree], sampler: Sampler, steps: int, pack_tokens: int) -> list[list[list[Tree]]]:
    """Return the packs of the first `steps` steps, or of as many as are looked at."""
    packs = []
    for step in range(min(steps, LOOKED_AT)):
        batch = [trees[i] for i in sampler.batch(step)]
        packs.append([[batch[i] for i in pack] for pack in cut(batch, pack_tokens)])
    return packs
