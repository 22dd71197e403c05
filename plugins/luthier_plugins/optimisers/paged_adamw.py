"""AdamW with its moments in paged memory, by bitsandbytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from luthier import Register, hookimpl
from luthier_toolkits.bitsandbytes import BitsAndBytesAdam


@dataclass(frozen=True)
class PagedAdamW(BitsAndBytesAdam):
    """AdamW whose fp32 moments CUDA moves to the host, page by page, when device memory runs out.

    What a long example needs for a moment then costs time instead of the run.
    """

    source: ClassVar[str] = (
        "Dettmers et al. 2023, arXiv 2305.14314, section 3, paged optimizers; bitsandbytes"
    )
    needs_device: ClassVar[Mapping[str, str]] = {
        "cuda": "elsewhere nothing is paged; choose optimiser=adamw, torch's fused AdamW"
    }
    bits: ClassVar[int] = 32
    paged: ClassVar[bool] = True


@hookimpl
def register_optimisers(register: Register) -> None:
    """Register `paged_adamw`."""
    register("paged_adamw", PagedAdamW)
