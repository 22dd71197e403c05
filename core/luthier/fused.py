"""Frozen parts of a model that run as one autograd function each, found by structure and checked at start.

A part is fused where its own forward and the gradient of its input agree with the fused ones on random rows;
any other is left alone. The fused forward sits on the module object itself, never on its class, and steps
back to the class's own wherever a call is not the one that was checked: trained weights, autocast, an adapter
or a hook on a child.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luthier.products import one_dnn_wins, product

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""How far a fused part may stray, relative to the largest value."""
ROWS = 40
"""Rows of the check: enough that `luthier.products` takes the path it takes in training."""


def fuse(model: nn.Module) -> dict[str, str]:
    """Fuse what can be fused in place and return it: module name → kind.

    Call it once the adapter is attached. Weights, state dict and copies of the model stay as they are.
    """
    fused = {}
    for name, module in model.named_modules():
        for kind, find in (("mlp", _mlp), ("linear", _linear)):
            forward = find(module)
            if forward is not None and _untouched(module) and _agrees(module, forward):
                module.forward = forward
                fused[name] = kind
                break
    return fused


def _mlp(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return a forward for ``down(act(gate(x)) * up(x))``, as three linear children and one more suggest."""
    children = dict(module.named_children())
    linears = [name for name, child in children.items() if _frozen(child, bias=False)]
    others = [name for name in children if name not in linears]
    if len(linears) != 3 or len(others) != 1 or any(True for _ in children[others[0]].parameters()):
        return None
    narrow = min(children[name].out_features for name in linears)  # type: ignore[type-var]
    down = [name for name in linears if children[name].out_features == narrow]
    wide = [name for name in linears if name not in down]
    if len(down) != 1 or children[wide[0]].weight.shape != children[wide[1]].weight.shape:
        return None
    # Which of the two is the gate is not in the structure; the check refuses the wrong order.
    for gate, up in (wide, wide[::-1]):
        forward = functools.partial(_run_mlp, module, gate, up, down[0], others[0])
        if _agrees(module, forward):
            return forward
    return None


def _linear(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return a forward for a frozen linear layer, where `luthier.products` knows a faster product."""
    if not (_frozen(module) and one_dnn_wins()):
        return None
    weight = module.weight
    fits = weight.dtype == torch.float32 and weight.device.type == "cpu"
    return functools.partial(_run_linear, module) if fits else None


def _run_mlp(module: Any, gate: str, up: str, down: str, act: str, x: Tensor) -> Tensor:
    parts = [getattr(module, name) for name in (gate, up, down)]
    if torch.is_autocast_enabled(x.device.type) or not all(_frozen(part, bias=False) for part in parts):
        out: Tensor = type(module).forward(module, x)
    else:
        out = _SwiGLU.apply(x, *(part.weight for part in parts), getattr(module, act))  # type: ignore[no-untyped-call]
    return out


def _run_linear(module: Any, x: Tensor) -> Tensor:
    if torch.is_autocast_enabled(x.device.type) or module.weight.requires_grad or x.dtype != torch.float32:
        out: Tensor = type(module).forward(module, x)
    else:
        out = _Linear.apply(x, module.weight, module.bias)  # type: ignore[no-untyped-call]
    return out


def _frozen(module: nn.Module, bias: bool = True) -> bool:
    """Whether `module` is a plain frozen linear layer that nothing listens to (with a bias only if `bias`)."""
    if type(module) is not nn.Linear or not (bias or module.bias is None) or _listened(module):
        return False
    return not any(parameter.requires_grad for parameter in module.parameters())


def _listened(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks
        or module._backward_hooks or module._backward_pre_hooks
    )  # fmt: skip


def _untouched(module: nn.Module) -> bool:
    return "forward" not in vars(module)


def _agrees(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> bool:
    """Compare value and input gradient with the module's own forward."""
    weight = next(module.parameters())
    if weight.is_meta:
        return False
    width = next(child.in_features for child in module.modules() if isinstance(child, nn.Linear))
    drawn = torch.randn(2, ROWS, width, generator=torch.Generator().manual_seed(0))
    try:
        expected = _value_and_gradient(type(module).forward.__get__(module), drawn, weight)
        found = _value_and_gradient(forward, drawn, weight)
    except Exception:  # noqa: BLE001 - a module that is not what its structure suggests may fail in any way
        return False
    bound = TOLERANCE.get(weight.dtype, 0.0)
    return all(
        a.shape == b.shape and bool((a - b).abs().max() <= bound * b.abs().max())
        for a, b in zip(found, expected, strict=True)
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


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b with W and b frozen: nothing but W is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        out = product(x.reshape(-1, x.shape[-1]), weight)
        if bias is not None:
            out += bias
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        rows = product(grad.reshape(-1, grad.shape[-1]), weight.T)
        return rows.view(*grad.shape[:-1], -1), None, None


class _SwiGLU(torch.autograd.Function):
    """y = (act(x Gᵀ) · x Uᵀ) Dᵀ, frozen: the outputs of gate and up are kept, not act nor their product."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (…, d)
        gate: Tensor,  # G (f, d)
        up: Tensor,  # U (f, d)
        down: Tensor,  # D (d, f)
        act: Callable[[Tensor], Tensor],
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        g, u = product(rows, gate), product(rows, up)  # (N, f)
        out = product(act(g) * u, down)
        ctx.save_for_backward(g, u, gate, up, down)
        ctx.act = act
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        g, u, gate, up, down = ctx.saved_tensors
        inner = product(grad.reshape(-1, grad.shape[-1]), down.T)  # (N, f)
        with torch.enable_grad():
            g = g.detach().requires_grad_()
            a = ctx.act(g)
        (grad_g,) = torch.autograd.grad(a, g, inner * u)
        rows = product(grad_g, gate.T)
        del grad_g
        rows += product(inner.mul_(a.detach()), up.T)
        return rows.view(grad.shape), None, None, None, None
