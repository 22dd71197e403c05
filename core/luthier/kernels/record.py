"""What a model's modules were told about how they run here: one record a module, which its copies keep."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

_ATTRIBUTE = "_luthier_kernels"


@dataclass(frozen=True)
class KernelRecord:
    """How one module runs; as transformers made it, where nothing is noted.

    Attributes:
        fused: Its forward is ours, wherever it has one of its own.
        wide: A norm that is given fp32 and answers in its weight's dtype, or an attention whose scores are
            fp32: see `luthier.kernels.fp32_residual`.
        turns: Its attention rotates queries and keys again in the backward pass, so that they remember what
            they were before: see `luthier.kernels.fused_rotary`.
    """

    fused: bool = False
    wide: bool = False
    turns: bool = False


_PLAIN = KernelRecord()


def record_of(module: nn.Module) -> KernelRecord:
    """Return the record of `module`."""
    return vars(module).get(_ATTRIBUTE, _PLAIN)  # type: ignore[no-any-return]


def note(module: nn.Module, **changes: bool) -> None:
    """Change fields of the record of `module`."""
    vars(module)[_ATTRIBUTE] = replace(record_of(module), **changes)


def keep_rotations(model: nn.Module, kept: bool) -> None:
    """Say whether attention reads how queries and keys were rotated; unread, it would be kept in vain."""
    for module in model.modules():
        if record_of(module).fused:
            note(module, turns=kept)


def is_wide(model: nn.Module) -> bool:
    """Whether a module of `model` keeps fp32 between half-precision weights."""
    return any(record_of(module).wide for module in model.modules())
