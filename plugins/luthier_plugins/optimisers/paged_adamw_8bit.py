"""AdamW with its moments in 8 bits and paged memory, by bitsandbytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from luthier import Register, hookimpl
from luthier_toolkits.bitsandbytes import BitsAndBytesAdam


@dataclass(frozen=True)
class PagedAdamW8bit(BitsAndBytesAdam):
    """AdamW whose moments take a byte each and move to the host when device memory runs out."""

    source: ClassVar[str] = (
        "Dettmers et al. 2023, arXiv 2305.14314, section 3, paged optimizers; bitsandbytes"
    )
    needs_device: ClassVar[Mapping[str, str]] = {
        "cuda": "elsewhere nothing is paged; choose optimiser=adamw_8bit or optimiser=adamw"
    }
    bits: ClassVar[int] = 8
    paged: ClassVar[bool] = True


@hookimpl
def register_optimisers(register: Register) -> None:
    """Register `paged_adamw_8bit`."""
    register("paged_adamw_8bit", PagedAdamW8bit)
