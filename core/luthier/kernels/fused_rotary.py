"""Rotary position embeddings as one autograd function, for attention modules that call transformers' own.

Transformers rotates with five passes over queries and keys, ours with two. Its attention modules name the
function in their forward; a fused one runs the same code with another function under that name.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luthier.kernels.record import record_of

NAME = "apply_rotary_pos_emb"
ARGUMENTS = ("q", "k", "cos", "sin", "unsqueeze_dim")
TOLERANCE = 1e-6
MARK = "_luthier_turned"
"""Attribute of a rotated tensor: how it came about."""
Rotate = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Angles:
    """Cosines and sines (…, T, D) of a rotation."""

    cos: Tensor
    sin: Tensor

    def forth(self, x: Tensor) -> Tensor:
        """Return x (…, T, D) rotated."""
        low, high = self.sin.chunk(2, dim=-1)
        return _rotate(x, self.cos, -low, high)

    def back(self, x: Tensor) -> Tensor:
        """Return x (…, T, D) rotated by the opposite angles: the gradient of `forth`."""
        low, high = self.sin.chunk(2, dim=-1)
        return _rotate(x, self.cos, high, -low)


@dataclass(frozen=True)
class Turned:
    """How a rotated tensor came about: what attention may keep in its place, being cheap to rotate again.

    The projection below often keeps `before` anyway; `luthier_plugins.adapters.dora.weight_norm` does.
    """

    before: Tensor  # (1, H, T, D)
    angles: Angles  # (1, 1, T, D)
    version: int


def turned(x: Tensor) -> Turned | None:
    """Return how `x` was rotated; None if that is not known or `x` has been written to since."""
    rotation: Turned | None = vars(x).get(MARK)
    return rotation if rotation is not None and rotation.version == x._version else None


class Rotary(torch.autograd.Function):
    """y = x · cos + (−x₂, x₁) · sin, x₁ and x₂ being the halves of x (RoFormer, arXiv 2104.09864)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return y (…, D); `cos` and `sin` broadcast to x (…, D)."""
        ctx.save_for_backward(cos, sin)
        return Angles(cos, sin).forth(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of x: the rotation back."""
        cos, sin = ctx.saved_tensors
        return Angles(cos, sin).back(grad), None, None


def rotary_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Return the forward of `module` with our rotation; None where its own is none, or another one."""
    own: Any = type(module).forward
    if not (isinstance(own, types.FunctionType) and NAME in own.__code__.co_names):
        return None
    theirs = own.__globals__.get(NAME)
    if theirs is None or not _agrees(theirs):
        return None
    names = {**own.__globals__, NAME: functools.partial(rotate, theirs, module)}
    forward = types.FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    return types.MethodType(forward, module)


def rotate(
    theirs: Rotate, module: nn.Module, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys (B, H, T, D) by angles (B, T, D); of mixed kinds, as `theirs` does.

    They remember how they were rotated where the attention of `module` reads it.
    """
    alike = q.dtype == k.dtype and q.shape[-1] == k.shape[-1] == cos.shape[-1]
    # Exact angles of halves: those of a wide residual stream. Under autocast they are left to torch.
    exact = cos.dtype == torch.float32 and not torch.is_autocast_enabled(q.device.type)
    if not (alike and (exact or cos.dtype == q.dtype)) or cos.requires_grad:  # a part, or learned angles
        return theirs(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    after: tuple[Tensor, Tensor] = Rotary.apply(q, cos, sin), Rotary.apply(k, cos, sin)  # type: ignore[no-untyped-call]
    for before, made in zip((q, k), after, strict=True) if record_of(module).turns else ():
        vars(made)[MARK] = Turned(before, Angles(cos, sin), made._version)
    return after


@functools.cache
def _agrees(theirs: Rotate) -> bool:
    """Compare values and gradients with theirs, on random rows and angles."""
    if tuple(inspect.signature(theirs).parameters) != ARGUMENTS:
        return False
    drawn = torch.randn(2, 8, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    try:
        ours = functools.partial(rotate, theirs, nn.Identity())
        actual, expected = (_rotated(turn, *drawn) for turn in (ours, theirs))
    except Exception:  # noqa: BLE001 - another rotation than it looks like may fail in any way
        return False
    return all(
        bool((a - b).abs().max() <= TOLERANCE * b.abs().max()) for a, b in zip(actual, expected, strict=True)
    )


def _rotated(rotation: Rotate, above: Tensor, drawn: Tensor) -> tuple[Tensor, ...]:
    q, k = (x.detach().clone().requires_grad_() for x in (drawn[:2], drawn[2:4]))  # (2, 3, 5, 16)
    cos, sin = drawn[4:6, 0], drawn[6:8, 0]  # (2, 5, 16)
    with torch.enable_grad():
        values = rotation(q, k, cos, sin)
        return (*values, *torch.autograd.grad(values, (q, k), (above[:2], above[2:4])))


def _rotate(x: Tensor, cos: Tensor, low: Tensor, high: Tensor) -> Tensor:
    out = x * cos
    first, second = x.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    out_first.addcmul_(second, low)
    out_second.addcmul_(first, high)
    return out.to(x.dtype)
