"""AdamW as bitsandbytes has it: moments in 8 bits, or in memory that CUDA moves to the host when full."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from luthier_toolkits.adam import AdamOptimiser

log = logging.getLogger("luthier")
BLOCK = 256
"""Values of a moment that share a scale."""
SMALLEST = 4096
"""Parameters with fewer elements keep their moments in fp32."""


class BitsAndBytesAdam(AdamOptimiser):
    """An `AdamOptimiser` that bitsandbytes runs.

    Attributes:
        bits: Of a moment: 8 (blocks of 256 with a scale, where a parameter has 4,096 elements or more) or 32.
        paged: Moments live in CUDA's unified memory.
    """

    bits: ClassVar[int]
    paged: ClassVar[bool]

    def build(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Return bitsandbytes' AdamW; its state stays paged when a checkpoint is loaded.

        Raises:
            ConfigError: A pattern matches nothing.
        """
        groups = self.torch_groups(parameters)
        if any(p.device.type == "cpu" for group in groups for p in group["params"]):
            log.warning(
                "bitsandbytes' AdamW is many times slower on CPU than torch's fused one: choose "
                "optimiser=adamw unless its moments do not fit"
            )
        made: torch.optim.Optimizer = _optimiser_class()(
            groups,
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            optim_bits=self.bits,
            min_8bit_size=SMALLEST,
            is_paged=self.paged,
        )
        return made

    def state_bytes(self, name: str, shape: tuple[int, ...]) -> float:
        """Two moments: fp32, or a byte each and a fp32 scale for each block."""
        count = math.prod(shape)
        if self.bits == 32 or count < SMALLEST:
            return 8.0 * count
        return 2.0 * count + 2 * 4 * math.ceil(count / BLOCK)


def _optimiser_class() -> Any:
    # Importing bitsandbytes takes a second that runs without it need not wait for.
    from bitsandbytes.optim.adamw import AdamW

    adamw: Any = AdamW  # which bitsandbytes leaves untyped

    class Adam(adamw):  # type: ignore[misc]
        """bitsandbytes' AdamW, which after loading a state would keep it in plain device memory."""

        def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = False) -> None:
            """Load the state and put its moments where fresh ones would be; the next step moves the rest."""
            super().load_state_dict(state_dict, move_to_device)
            self.initialized = False
            for parameter, state in self.state.items():
                for name in ("state1", "state2"):
                    buffer = self.get_state_buffer(parameter, dtype=state[name].dtype)
                    state[name] = buffer.copy_(state[name])

    return Adam
