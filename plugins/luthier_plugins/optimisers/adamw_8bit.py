"""AdamW with its moments in 8 bits, by bitsandbytes."""

from dataclasses import dataclass
from typing import ClassVar

from luthier import Register, hookimpl
from luthier_toolkits.bitsandbytes import BitsAndBytesAdam


@dataclass(frozen=True)
class AdamW8bit(BitsAndBytesAdam):
    """AdamW whose moments take a byte each: blocks of 256 values share a scale.

    Moments of parameters with fewer than 4,096 elements stay in fp32. On CPU torch's fused AdamW is far
    faster.
    """

    source: ClassVar[str] = "Dettmers et al. 2021, arXiv 2110.02861, section 2; bitsandbytes"
    bits: ClassVar[int] = 8
    paged: ClassVar[bool] = False


@hookimpl
def register_optimisers(register: Register) -> None:
    """Register `adamw_8bit`."""
    register("adamw_8bit", AdamW8bit)
