"""Everything a training run carries from one step to the next, as tensors and JSON, and back."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from luthier.errors import LuthierError, ModelError
from luthier.system import Processes, like_parameter, whole_tensor

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Snapshot:
    """A run between two steps.

    Attributes:
        tensors: File name → name → tensor.
        values: What is no tensor, as JSON holds it.
    """

    tensors: dict[str, Tensors]
    values: dict[str, Any]


@dataclass(frozen=True)
class TrainingState:
    """What trains: the model, its optimiser and schedule, in all processes."""

    model: nn.Module
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    processes: Processes

    def capture(self, progress: dict[str, Any]) -> Snapshot:
        """Return the state, whole and on the CPU; every process must call it."""
        optimiser: Tensors = {}
        values = {
            "progress": progress,
            "optimiser": flatten(self.optimiser.state_dict(), optimiser, "optimiser"),
            "schedule": flatten(self.schedule.state_dict(), {}, "schedule"),
            "random": self.processes.gather(_random(self._device)),
        }
        return Snapshot({"weights": self._weights(), "optimiser": optimiser}, values)

    def restore(self, snapshot: Snapshot) -> None:
        """Take up a captured state, whatever number of processes captured it.

        Raises:
            ModelError: It belongs to another model.
        """
        self.restore_weights(snapshot.tensors["weights"])
        state = unflatten(snapshot.values["optimiser"], snapshot.tensors["optimiser"])
        for number, parameter in enumerate(
            p for group in self.optimiser.param_groups for p in group["params"]
        ):
            for key, value in state["state"].get(number, {}).items():
                if isinstance(value, torch.Tensor):
                    state["state"][number][key] = like_parameter(value, parameter)
        self.optimiser.load_state_dict(state)
        self.schedule.load_state_dict(unflatten(snapshot.values["schedule"], {}))
        self._follow_schedule()
        states = snapshot.values["random"]
        # A process that the checkpoint does not know keeps its fresh seed.
        if self.processes.rank < len(states):
            _set_random(states[self.processes.rank], self._device)

    def _follow_schedule(self) -> None:
        """Take the learning rate from the schedule as it is now: the run may have become longer."""
        if isinstance(self.schedule, torch.optim.lr_scheduler.LambdaLR):
            factors = [factor(self.schedule.last_epoch) for factor in self.schedule.lr_lambdas]
            rates = [base * factor for base, factor in zip(self.schedule.base_lrs, factors, strict=True)]
            for group, rate in zip(self.optimiser.param_groups, rates, strict=True):
                group["lr"] = rate
            self.schedule._last_lr = rates

    @torch.no_grad()
    def restore_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy in the trained weights alone.

        Raises:
            ModelError: They belong to another model.
        """
        own = trained_tensors(self.model)
        if odd := sorted(own.keys() ^ weights.keys()):
            raise ModelError(f"the checkpoint belongs to another model or adapter: '{odd[0]}' is in one only")
        for name, tensor in own.items():
            if tensor.shape != weights[name].shape:
                actual, expected = list(weights[name].shape), list(tensor.shape)
                raise ModelError(f"the checkpoint's {name} is {actual}, expected {expected}")
            tensor.copy_(like_parameter(weights[name], tensor))

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _weights(self) -> Tensors:
        return {name: _on_cpu(tensor) for name, tensor in trained_tensors(self.model).items()}


def trained_tensors(model: nn.Module) -> Tensors:
    """Return what training determines: the parameters that train, and every buffer that is saved."""
    tensors: Tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                tensors[f"{prefix}.{name}" if prefix else name] = buffer
    return tensors


def flatten(value: Any, tensors: Tensors, where: str) -> Any:
    """Return `value` as JSON; its tensors go to `tensors` under their path.

    Raises:
        LuthierError: It holds something that could not be read back without running code.
    """
    if isinstance(value, torch.Tensor):
        tensors[where] = _on_cpu(value)
        return {"tensor": where}
    if isinstance(value, Mapping):
        return {"items": [[key, flatten(inner, tensors, f"{where}.{key}")] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        parts = [flatten(inner, tensors, f"{where}.{number}") for number, inner in enumerate(value)]
        return {"tuple": parts} if isinstance(value, tuple) else parts
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise LuthierError(
        f"{where} is a {type(value).__name__}; a checkpoint holds tensors, numbers and text only"
    )


def unflatten(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return what `flatten` was given."""
    if isinstance(value, list):
        return [unflatten(inner, tensors) for inner in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(unflatten(inner, tensors) for inner in value["tuple"])
    return {key: unflatten(inner, tensors) for key, inner in value["items"]}


def seed_everything(seed: int, rank: int) -> None:
    """Seed every generator a method may draw from; processes draw different dropout masks."""
    torch.manual_seed(seed + 1_000_003 * rank)
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    # A copy, as safetensors wants memory that nothing else shares.
    return whole_tensor(tensor.detach()).to("cpu", copy=True).contiguous()


def _random(device: torch.device) -> dict[str, Any]:
    """Return the state of every generator that a run on `device` draws from, as JSON."""
    name, keys, *rest = np.random.get_state()
    version, numbers, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "python": [version, list(numbers), gauss],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes().hex()
    return state


def _set_random(state: Mapping[str, Any], device: torch.device) -> None:
    version, numbers, gauss = state["python"]
    name, keys, *rest = state["numpy"]
    torch.set_rng_state(_bytes(state["torch"]))
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(_bytes(state["cuda"]), device)


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
