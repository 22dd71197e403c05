"""How long a run takes: the work of a token on shapes, and the speed of a device."""

from __future__ import annotations

import copy
import dataclasses
import time

import torch

from luthier.trees import Segment, TreeSpans
from luthier_plugins.commands.plan.shapes import Sampled
from luthier_plugins.commands.plan.simulation import Setting, area, work

_TOKENS = 64
"""Tokens that are run: one tile of attention, from which longer rows follow."""
_SIZE, _REPEATS = 1024, 3


def flops_per_token(model: Sampled, tokens: int, setting: Setting, backward: bool = True) -> float:
    """Return the floating-point operations, `backward` included or not, for a token of a row of `tokens`."""
    setting = dataclasses.replace(setting, device="cpu")  # a GPU's kernel for attention counts nothing
    whole = work(copy.deepcopy(model.model), _TOKENS, setting, backward)
    everything, attention = whole
    for place, count in enumerate(model.stands_for):
        if count > 1:
            less = work(model.without(place).model, _TOKENS, setting, backward)
            everything += (count - 1) * (whole[0] - less[0])
            attention += (count - 1) * (whole[1] - less[1])
    tiles = TreeSpans((Segment(0, tokens),)).tiles(None, torch.empty(()))
    longer = sum(area(tile) for tile in tiles) / tokens / _TOKENS**2
    return (everything - attention) / _TOKENS + attention * longer


def measured_tflops(device: str, dtype: torch.dtype) -> float:
    """Return the speed of one square product here, TFLOP/s."""
    left, right = (torch.ones(_SIZE, _SIZE, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        float((left @ right)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2e-12 * _SIZE**3 / best
