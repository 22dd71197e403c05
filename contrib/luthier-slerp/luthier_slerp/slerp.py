"""SLERP: from one model to another along the arc between their tensors."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from luthier import ConfigError, Group, Merger, Register, hookimpl, option


@dataclass(frozen=True)
class Slerp(Merger):
    """``(sin((1−t)Ω)·W₁ + sin(tΩ)·W₂) / sin Ω``, Ω the angle between W₁ and W₂; straight where that is 0."""

    source: ClassVar[str] = "Shoemake 1985, Animating rotation with quaternion curves, section 3.3"
    least_inputs: ClassVar[int] = 2
    most_inputs: ClassVar[int | None] = 2
    symmetric: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False

    t: float = option(0.5, "How far to go from the first model to the second, in [0, 1].")

    def __post_init__(self) -> None:
        if not 0 <= self.t <= 1:
            raise ConfigError(f"merger.t={self.t} must be in [0, 1]")

    def merge(self, group: Group) -> torch.Tensor:
        """Return the merged tensor."""
        a, b = group.tensors
        angle = torch.arccos((a.flatten() @ b.flatten() / (a.norm() * b.norm())).clamp(-1, 1))
        if not angle.sin() > 1e-4:  # parallel, opposite or zero
            return torch.lerp(a, b, self.t)
        return (((1 - self.t) * angle).sin() * a + (self.t * angle).sin() * b) / angle.sin()


@hookimpl
def register_mergers(register: Register) -> None:
    """Register `slerp`."""
    register("slerp", Slerp)
