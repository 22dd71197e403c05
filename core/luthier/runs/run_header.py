"""The header of a run: what will happen, in a few lines, before the first step."""

import math
from pathlib import Path

from omegaconf import DictConfig
from torch import nn

from luthier.adapters import linear_shape
from luthier.data import Encoded
from luthier.models import LoadedModel


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters train, and how many there are; tied ones count once."""
    parameters = list(model.parameters())
    # A quantised layer stores its weights packed.
    packed = sum(
        math.prod(linear_shape(m)) - m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)
    )
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return trained, sum(p.numel() for p in parameters) + packed


def model_line(loaded: LoadedModel) -> str:
    """Return the line that says which model, how large, in which numbers, where."""
    trained, total = parameter_counts(loaded.model)
    share = f", {trained:,} trained ({100 * trained / total:.2f} %)" if 0 < trained < total else ""
    dtype = str(loaded.dtype).removeprefix("torch.")
    name = Path(loaded.name).name if Path(loaded.name).is_absolute() else loaded.name
    return f"model     {name} · {total:,} parameters{share} · {dtype} on {loaded.device}"


def header(
    config: DictConfig,
    loaded: LoadedModel,
    data: Encoded,
    held_out: Encoded | None,
    total_steps: int,
    steps_per_epoch: int,
) -> list[str]:
    """Return the lines: model, data with what was dropped and why, held-out rows, steps and methods."""
    epochs = total_steps / steps_per_epoch
    lines = [model_line(loaded), *data.lines("data")]
    if held_out:
        lines += held_out.lines("held out")
    over = f" over {config.quantiser.name}" if config.quantiser else ""
    methods = f"{config.objective.name}, {config.adapter.name}{over}, {config.optimiser.name}"
    many = ["s" * (count != 1) for count in (total_steps, config.batch_size)]
    steps = f"{total_steps} step{many[0]} of {config.batch_size} example{many[1]} ({epochs:.2f} epochs)"
    return [*lines, f"run       {steps} · {methods} · {config.run_dir}"]
