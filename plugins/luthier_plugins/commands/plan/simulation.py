"""One forward and backward pass without data: every operation runs on shapes, and living bytes are counted.

Operations run on torch's fake tensors, which call themselves CPU tensors, so that autocast, attention and the
chunks of the head do what they do in a run. What a kernel takes for itself while it runs is not seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface, PreTrainedModel

from luthier.contracts import Objective
from luthier.kernels import fuse, widen
from luthier.models import quiet
from luthier.policy import ModelPolicy, first_blocks_for
from luthier.trees import Branch, Pack, Tile, Tree, TreeSpans

KERNEL = "luthier_planned_kernel"


@dataclass(frozen=True)
class Setting:
    """How a run computes.

    Attributes:
        device: ``cpu`` or ``cuda``.
        stored: Dtype of the base weights.
        autocast: What to autocast to; None: no autocast.
        fused: Frozen parts are fused.
        checkpointing: Activations are computed again in the backward pass.
        several: A step has several packs, so gradients are there when activations are at their most.
        frees: Every gradient is used up as soon as it is whole, and never there before.
        wide: The residual stream is in fp32.
    """

    device: str
    stored: torch.dtype
    autocast: torch.dtype | None
    fused: bool = True
    checkpointing: bool = False
    several: bool = True
    frees: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Pass:
    """Bytes and work of one pack.

    Attributes:
        kept: What is alive between forward and backward pass, beside the model and its gradients.
        peak: The most that is ever alive, likewise; gradients that the pass itself makes are counted.
        ends: What is alive in the forward pass at the end of every layer that was asked for.
    """

    kept: float
    peak: float
    ends: tuple[float, ...] = ()

    def plus(self, other: Pass, times: float) -> Pass:
        """Return ``self + times · other``."""
        return Pass(self.kept + times * other.kept, self.peak + times * other.peak)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations make, until they are freed.

    Attributes:
        live: Now.
        peak: At most.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        """`known` tensors, and views of them, are not counted."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known = [tensor.untyped_storage() for tensor in known]  # held, so that no id is used again
        self._seen = {id(storage) for storage in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` and look at what it made."""
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            # Half of all calls: fake tensors are asked where they are.
            inside = args[0].fake_mode.in_kernel_invocation
            return torch.device("meta") if inside else args[0].fake_device
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        if id(storage) in self._seen:
            return
        self._seen.add(id(storage))
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, id(storage), storage.nbytes()).atexit = False

    def _free(self, name: int, size: int) -> None:
        self._seen.discard(name)
        self.live -= size


def _tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, tuple | list):
        for item in out:
            yield from _tensors(item)


def simulate(
    model: PreTrainedModel,
    trees: Sequence[Tree],
    objective: Objective,
    setting: Setting,
    layers: Sequence[nn.Module] = (),
) -> Pass:
    """Run one pack of `trees` through `model`, which is on the meta device and is used up by it."""
    with _prepared(model, setting) as (policy, known):
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            if setting.frees:
                parameter.register_post_accumulate_grad_hook(_forget)
            elif setting.several:
                parameter.grad = torch.empty_like(parameter)
                known.append(parameter.grad)
        pack = _pack(model, trees)
        known += [pack.input_ids, pack.position_ids, pack.positions, pack.targets]
        with first_blocks_for(setting.device), LiveBytes(known) as live:
            ends: dict[nn.Module, int] = {}
            for layer in layers:  # checkpointing comes by again, which does not count
                layer.register_forward_hook(lambda module, *_: ends.setdefault(module, live.live) and None)
            loss = objective.loss(policy, pack).total
            kept = live.live
            loss.backward()  # type: ignore[no-untyped-call]
    return Pass(kept, live.peak, tuple(ends.values()))


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


@torch.no_grad()
def forward_peak(model: PreTrainedModel, trees: Sequence[Tree], setting: Setting) -> float:
    """Return the most bytes that are alive beside `model`, which is used up, where nothing is kept."""
    with _prepared(model, setting) as (policy, known):
        pack = _pack(model, trees)
        known += [pack.input_ids, pack.position_ids, pack.positions, pack.targets]
        with first_blocks_for(setting.device), LiveBytes(known) as live:
            policy.logprobs(pack)
    return float(live.peak)


def work(model: PreTrainedModel, tokens: int, setting: Setting, backward: bool = True) -> tuple[float, float]:
    """Return the floating-point operations of a row of `tokens`, every one supervised: all, and attention's.

    A multiply-add is two; what checkpointing computes again counts, and so does `backward`, if it is wanted.
    `model` is used up.
    """
    with _prepared(model, setting) as (policy, _):
        pack = Pack.of([Tree((0,), (Branch((0,) * (tokens - 1)),))])
        # As for a GPU, the head is one chunk.
        with first_blocks_for("cuda"), _Work() as done, torch.set_grad_enabled(backward):  # type: ignore[no-untyped-call]
            total = policy.logprobs(pack).values.sum()
            if backward:
                total.backward()  # type: ignore[no-untyped-call]
    return done.total, done.batched


class _Work(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what torch's counter of operations says of each product."""

    total = batched = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            done = flop_registry[packet](*args, **(kwargs or {}), out_val=out)
            self.total += done
            self.batched += done * (packet in (torch.ops.aten.bmm, torch.ops.aten.baddbmm))
        elif packet is torch.ops.mkldnn._linear_pointwise:
            self.total += 2.0 * out.numel() * args[1].shape[1]
        return out


@contextlib.contextmanager
def _prepared(model: PreTrainedModel, setting: Setting) -> Iterator[tuple[ModelPolicy, list[Tensor]]]:
    """Yield the policy of `model` as `setting` runs it, and its tensors, which are fake in the block."""
    names = fuse(model) if setting.fused else {}
    if setting.wide:
        widen(model, names)
    if setting.checkpointing:
        with quiet():
            model.gradient_checkpointing_enable({"use_reentrant": False})
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = _fake(model.train())
        policy = ModelPolicy(model, autocast_dtype=setting.autocast)
        if setting.device != "cpu":
            model.set_attn_implementation(KERNEL)
        yield policy, tensors


def _fake(model: nn.Module) -> list[Tensor]:
    """Make every tensor of `model` a fake one, in place; return them."""
    made: dict[int, Tensor] = {}
    replaced = []  # held, so that no id is used again
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fresh = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                    trains = tensor.requires_grad
                    made[id(tensor)] = nn.Parameter(fresh, trains) if table is module._parameters else fresh
                replaced.append(tensor)
                table[name] = made[id(tensor)]
        if "rope_type" in vars(module):
            vars(module)["rope_type"] = "default"  # others look at the positions, which are not there
    return list(made.values())


class _LargestTile(TreeSpans):
    """Spans whose largest tile stands for all: tiles come one after the other, so memory is the same."""

    def tiles(self, window: int | None, like: Tensor) -> list[Tile]:
        """Return the tile and the one before it, of which something is left when the next begins."""
        every = super().tiles(window, like)
        place = max(range(len(every)), key=lambda index: area(every[index]))
        return every[max(0, place - 1) : place + 1]


def area(tile: Tile) -> int:
    """Return the scores of a tile, of one head."""
    return int(tile.bias.shape[0] * sum(keys.stop - keys.start for keys in tile.keys))


def _pack(model: PreTrainedModel, trees: Sequence[Tree]) -> Pack:
    pack = Pack.of(trees)
    config = model.config.get_text_config().to_dict()
    if any(config.get(name) for name in ("attention_dropout", "attn_pdrop")):
        return pack  # which keeps the mask of every tile
    return dataclasses.replace(pack, spans=_LargestTile(pack.spans.segments))


class _Kernel(torch.autograd.Function):
    """Attention as a GPU's kernel does it: q, k, v, output and a row of sums stay, scores never exist."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:3], value.shape[3])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _kernel(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **others: Any
) -> tuple[Tensor, None]:
    if torch.is_autocast_enabled("cpu"):
        low = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(low), key.to(low), value.to(low)
    attended: Tensor = _Kernel.apply(query, key, value)  # type: ignore[no-untyped-call]
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register(KERNEL, _kernel)
