"""Several processes: who does what, how gradients are summed, how a sharded model runs and is made whole.

`accelerate launch` starts the processes and says how (DDP, or FSDP2 with ``--use_fsdp --fsdp_version 2``);
torch moves the numbers. A process that was started alone needs none of it and imports none of it.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from luthier.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from luthier.policy import ModelPolicy

T = TypeVar("T")
BUCKET = 1 << 24
"""Elements of gradient that are summed in one message."""
_DONE = itertools.count()
"""Numbers of what the main process did alone; every process counts the same."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: Which one this is.
        count: How many there are.
        sharded: Every process holds a part of each parameter (FSDP2) instead of a copy (DDP).
    """

    rank: int = 0
    count: int = 1
    sharded: bool = False

    @classmethod
    def launched(cls) -> Processes:
        """Return the processes that `accelerate launch` or torchrun started, connected; else one.

        Raises:
            ConfigError: They were started for DeepSpeed or FSDP1.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if sharded and os.environ.get("FSDP_VERSION", "1") != "2":
            raise ConfigError("FSDP1 is superseded; accelerate launch --use_fsdp --fsdp_version 2 shards")
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
            raise ConfigError("DeepSpeed is not supported; --use_fsdp --fsdp_version 2 shards likewise")
        from accelerate import PartialState

        # On a machine without accelerator, accelerate takes several processes for one unless it is told.
        state = PartialState(cpu=not torch.accelerator.is_available())
        return cls(state.process_index, state.num_processes, sharded)

    @property
    def main(self) -> bool:
        """Whether this process writes the run folder and speaks."""
        return self.rank == 0

    def same(self, value: T) -> T:
        """Return what the main process gives."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        shared: T = broadcast_object_list([value])[0]
        return shared

    def after_main(self, work: Callable[[], None]) -> None:
        """Let the main process do `work`, the others waiting for hours if they must: collectives time out."""
        if self.main:
            work()
        if self.count > 1:
            store, done = torch.distributed.distributed_c10d._get_default_store(), f"luthier.{next(_DONE)}"
            if self.main:
                store.set(done, "")
            while not store.check([done]):
                time.sleep(0.2)
            self.gather(None)  # the store ends with the main process, which must outlast the others' look

    def gather(self, value: T) -> list[T]:
        """Return what every process gives, by rank, in every process."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        gathered: list[T] = gather_object([value])
        return gathered

    def share(self, packs: Sequence[T]) -> list[T]:
        """Return this process's part of a step's packs."""
        return list(packs[self.rank :: self.count])

    def sum_gradients(self, parameters: Sequence[nn.Parameter], weight: float) -> float | torch.Tensor:
        """Make every process's gradients the sums over all of them; return the sum of their weights.

        A parameter that got a gradient nowhere keeps none. Sharded gradients are summed in the backward pass.
        """
        if self.count == 1:
            return weight
        total = torch.tensor(weight, dtype=torch.float64, device=parameters[0].device)
        torch.distributed.all_reduce(total)
        if not self.sharded:
            _sum_copies(parameters)
        return total

    def distribute(self, policy: ModelPolicy) -> nn.Module | None:
        """Shard the policy's model where FSDP2 asks for it; call it before the optimiser is built.

        Returns:
            In the main process, a plain twin without memory for `gather_into`; None elsewhere and unsharded.
        """
        if not self.sharded:
            return None
        twin = _twin(policy.model) if self.main else None
        root = _Root(policy.model)
        _shard(root)
        policy.route = root
        return twin

    @contextlib.contextmanager
    def whole(self, policy: ModelPolicy) -> Iterator[None]:
        """Hold the whole model in every process for the block, so that each can run it on its own."""
        if not self.sharded:
            yield
            return
        policy.route(lambda: None)  # the first call of the root sets FSDP up
        parts = [module for module in policy.route.modules() if _is_sharded(module)]  # type: ignore[attr-defined]
        for part in parts:
            part.unshard()
            part.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for part in parts:
                part.reshard()
                part.set_reshard_after_forward(part is not parts[0], recurse=False)

    def gather_into(self, twin: nn.Module | None, model: nn.Module) -> nn.Module:
        """Return `model`, or where it is sharded, its `twin` filled with the whole weights (main process)."""
        if not self.sharded:
            return model
        state = {name: whole_tensor(tensor) for name, tensor in model.state_dict().items()}
        if twin is None:
            return model
        twin.load_state_dict(state, strict=True, assign=True)
        twin.tie_weights()  # type: ignore[operator]
        return twin


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor`, or the whole of one that is sharded; every process must call it."""
    full: Callable[[], torch.Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of `tensor`, which shares its memory."""
    part: Callable[[], torch.Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def like_parameter(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return `tensor` on the device of `parameter`, sharded as it is if it has the same whole shape."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
        # Every process read the same file: nothing is sent.
        return distribute_tensor(
            tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    return tensor


class _Root(nn.Module):
    """Calls something inside the forward pass of the outermost sharded module, its own weights whole."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: Callable[[], Any]) -> Any:
        return call()


def _shard(root: _Root) -> None:
    """Shard every block that transformers says must not be split, then the rest; gradients are summed."""
    from torch.distributed.fsdp import fully_shard

    blocks = getattr(root.model, "_no_split_modules", None) or ()
    for module in list(root.model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module)
    fully_shard(root)
    parts = [module for module in root.modules() if _is_sharded(module)]
    for before, part in zip([parts[-1], *parts], parts, strict=False):
        # What is fetched next is said here: torch would take it from the forward passes of the evaluations
        # too, of which every process has its own number, so that they would wait for each other for ever.
        part.set_modules_to_backward_prefetch([before])  # type: ignore[operator]
        # Plain sums, which every backend has; the engine divides.
        part.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
        part.set_gradient_divide_factor(1.0)  # type: ignore[operator]


def _is_sharded(module: nn.Module) -> Any:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _twin(model: nn.Module) -> nn.Module:
    """Return a copy of `model` whose parameters take no memory."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        for parameter in model.parameters()
    }
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        name = type(model).__name__
        raise ModelError(f"{name} cannot be copied, so not saved if sharded: {error}") from error


def _sum_copies(parameters: Sequence[nn.Parameter]) -> None:
    present = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    torch.distributed.all_reduce(present)
    gradients = []
    for parameter, held in zip(parameters, present.tolist(), strict=True):
        if held:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        torch.distributed.all_reduce(flat)
        parts = torch.split(flat, [gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [p.view_as(g) for p, g in zip(parts, bucket, strict=True)])


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Group neighbours of one dtype, about `BUCKET` elements at a time."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        full = sum(member.numel() for member in bucket) + tensor.numel() > BUCKET
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
