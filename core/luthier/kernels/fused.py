"""Frozen parts of a model that run as one autograd function each, found by structure and checked at start.

A part is fused where its own forward and the gradient of its input agree with the fused ones on random rows;
any other is left alone. The fused forward sits on the module object itself, never on its class, and steps
back to the class's own wherever a call is not the one that was checked: trained weights, autocast, an adapter
or a hook on a child.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from luthier.kernels.fused_functions import FrozenGatedMLP, FrozenLinear, FrozenNorm
from luthier.kernels.fused_rotary import rotary_forward
from luthier.kernels.matmul import one_dnn_wins
from luthier.kernels.record import note, record_of

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""How far a fused part may stray, relative to the largest value."""
ROWS = 40
"""Rows of the check: enough that `luthier.kernels.matmul` takes the path it takes in training."""
Candidate = tuple[Callable[[Tensor], Tensor], int]
"""A forward that may be the module's, and the width of its input."""


def fuse(model: nn.Module) -> dict[str, str]:
    """Fuse what can be fused in place and return it: module name → kind.

    Call it once the adapter is attached. Weights, state dict and copies of the model stay as they are.
    """
    fused = {}
    for name, module in model.named_modules():
        for kind, find in (("mlp", _mlp), ("norm", _norm), ("linear", _linear)):
            forward = _fitting(module, find)
            if forward is not None and "forward" not in vars(module):
                module.forward = forward
                fused[name] = kind
        rotated = rotary_forward(module)
        if rotated is not None and "forward" not in vars(module):
            module.forward = rotated
            fused[name] = "rotary"
        if name in fused:
            note(module, fused=True)
    return fused


@contextlib.contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Run every module as transformers wrote it, for the block: to the bits of a model just loaded."""
    ours = {module: vars(module).pop("forward") for module in model.modules() if is_fused(module)}
    try:
        yield
    finally:
        for module, forward in ours.items():
            module.forward = forward


def is_fused(module: nn.Module) -> bool:
    """Whether the forward of `module` is ours just now."""
    return record_of(module).fused and "forward" in vars(module)


def _fitting(
    module: nn.Module, find: Callable[[nn.Module], Iterator[Candidate]]
) -> Callable[[Tensor], Tensor] | None:
    """Return the first forward that `find` proposes for `module` and that agrees with its own."""
    proposed = list(find(module))
    judged = _small(module) if proposed else module
    pairs = zip(proposed, find(judged), strict=True)
    return next((fit for (fit, _), (like, width) in pairs if _agrees(judged, like, width)), None)


def _small(module: nn.Module) -> nn.Module:
    """Return `module`, or if it is of shapes alone a small copy with drawn weights, to be judged for it."""
    weights = list(module.parameters())
    if not any(weight.is_meta for weight in weights):
        return module
    sizes = sorted({size for weight in weights for size in weight.shape})
    small = {size: 8 * (2 + place) for place, size in enumerate(sizes)}
    generator = torch.Generator().manual_seed(0)

    def drawn(weight: Tensor) -> nn.Parameter:
        values = torch.randn([small[size] for size in weight.shape], generator=generator)
        return nn.Parameter(values.to(weight.dtype), weight.requires_grad)

    def copied(of: nn.Module) -> nn.Module:
        twin = copy.copy(of)
        twin._parameters = {name: p if p is None else drawn(p) for name, p in of._parameters.items()}
        twin._modules = {name: m if m is None else copied(m) for name, m in of._modules.items()}
        return twin

    return copied(module)


def _mlp(module: nn.Module) -> Iterator[Candidate]:
    """Propose ``down(act(gate(x)) * up(x))`` for three linear children and one without weights."""
    children = dict(module.named_children())
    linears: dict[str, Any] = {name: child for name, child in children.items() if _frozen(child, bias=False)}
    others = [name for name in children if name not in linears]
    if len(linears) != 3 or len(others) != 1 or any(True for _ in children[others[0]].parameters()):
        return
    for down, gate, up in itertools.permutations(linears):
        # Which of the two wide ones is the gate is not in the structure; the check refuses the wrong order.
        shapes = [tuple(linears[name].weight.shape) for name in (down, gate, up)]
        if shapes[1] == shapes[2] == shapes[0][::-1]:
            yield functools.partial(_run_mlp, module, gate, up, down, others[0]), shapes[0][0]


def _norm(module: nn.Module) -> Iterator[Candidate]:
    """Propose an RMS norm for one frozen vector and one small number; in fp32 it would keep no less."""
    weights = list(module.parameters())
    small = [value for value in vars(module).values() if isinstance(value, float) and 0 < value < 1e-2]
    if len(weights) != 1 or weights[0].dim() != 1 or any(True for _ in module.children()) or len(small) != 1:
        return
    if "weight" in module._parameters and weights[0].dtype in (torch.bfloat16, torch.float16):
        for plus_one in (False, True):
            yield functools.partial(_run_norm, module, small[0], plus_one), len(weights[0])


def _linear(module: nn.Module) -> Iterator[Candidate]:
    """Propose a faster product for a frozen linear layer, where `luthier.kernels.matmul` knows one."""
    if _frozen(module) and one_dnn_wins():
        assert isinstance(module, nn.Linear)
        if module.weight.dtype == torch.float32 and module.weight.device.type == "cpu":
            yield functools.partial(_run_linear, module), module.in_features


def _run_mlp(module: Any, gate: str, up: str, down: str, act: str, x: Tensor) -> Tensor:
    parts = [getattr(module, name) for name in (gate, up, down)]
    if torch.is_autocast_enabled(x.device.type) or not all(_frozen(part, bias=False) for part in parts):
        out: Tensor = type(module).forward(module, x)
    else:
        weights = (part.weight for part in parts)
        out = FrozenGatedMLP.apply(x, *weights, getattr(module, act)).view(x.shape)  # type: ignore[no-untyped-call]
    return out


def _run_linear(module: Any, x: Tensor) -> Tensor:
    if torch.is_autocast_enabled(x.device.type) or module.weight.requires_grad or x.dtype != torch.float32:
        out: Tensor = type(module).forward(module, x)
    else:
        rows: Tensor = FrozenLinear.apply(x, module.weight, module.bias)  # type: ignore[no-untyped-call]
        out = rows.view(*x.shape[:-1], -1)
    return out


def _run_norm(module: Any, eps: float, plus_one: bool, x: Tensor) -> Tensor:
    wide = record_of(module).wide and x.dtype == torch.float32
    if module.weight.requires_grad or not (wide or x.dtype == module.weight.dtype):
        out: Tensor = type(module).forward(module, x)
    else:
        out = FrozenNorm.apply(x, module.weight, eps, plus_one)  # type: ignore[no-untyped-call]
    return out


def _frozen(module: nn.Module, bias: bool = True) -> bool:
    """Whether `module` is a plain frozen linear layer nothing listens to; with a bias only if `bias`."""
    return (
        type(module) is nn.Linear
        and (bias or module.bias is None)
        and not _listened(module)
        and not any(parameter.requires_grad for parameter in module.parameters())
    )


def _listened(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks
        or module._backward_hooks or module._backward_pre_hooks
    )  # fmt: skip


def _agrees(module: nn.Module, forward: Callable[[Tensor], Tensor], width: int) -> bool:
    """Compare value and input gradient with the module's own forward."""
    weight = next(module.parameters())
    drawn = torch.randn(2, ROWS, width, generator=torch.Generator().manual_seed(0))
    try:
        expected = _value_and_gradient(type(module).forward.__get__(module), drawn, weight)
        actual = _value_and_gradient(forward, drawn, weight)
    except Exception:  # noqa: BLE001 - a module that is not what its structure suggests may fail in any way
        return False
    bound = TOLERANCE.get(weight.dtype, 0.0)
    return all(
        a.shape == b.shape and bool((a - b).abs().max() <= bound * b.abs().max())
        for a, b in zip(actual, expected, strict=True)
    )


def _value_and_gradient(
    forward: Callable[[Tensor], Tensor], drawn: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    x = drawn[:1].to(weight.device, weight.dtype).requires_grad_()
    with torch.enable_grad():
        value = forward(x)
        towards = drawn[1:].sum(-1, keepdim=True).to(value).expand_as(value) * value.detach().sign()
        (gradient,) = torch.autograd.grad(value, x, towards)
    return value.detach().float(), gradient.float()
