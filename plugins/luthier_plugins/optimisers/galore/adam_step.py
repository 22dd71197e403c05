"""One step of AdamW on one parameter, by torch's fused function."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.adamw import adamw


def adam_step(
    p: Tensor,
    gradient: Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
    broken: Tensor,
    lr: float,
    weight_decay: float,
) -> None:
    """Take AdamW's step; where `broken`, nothing changes, and nobody waits for the device to say so."""
    beta1, beta2 = group["betas"]
    adamw(
        [p], [gradient], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
        fused=True, found_inf=broken.float(), amsgrad=False, maximize=False,
        beta1=beta1, beta2=beta2, lr=lr, weight_decay=weight_decay, eps=group["eps"],
    )  # fmt: skip
