"""Peak memory: of the whole process, and of a part of it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_before: dict[str, float] = {}
"""The peak up to the last `restart`, by type of device."""


def peak_memory_mb(device: torch.device) -> float:
    """Return the whole process's peak in MiB: allocated on an accelerator, resident on CPU."""
    return max(since_restart_mb(device), _before.get(device.type, 0.0))


def restart(device: torch.device) -> bool:
    """Let `since_restart_mb` forget what was; return whether this system can."""
    before = peak_memory_mb(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            _CLEAR.write_text("5")
        except OSError:
            return False
    _before[device.type] = before
    return True


def since_restart_mb(device: torch.device) -> float:
    """Return the peak in MiB since `restart`, or since the start where there was none."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**20
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 2**10


def resident_bytes() -> float | None:
    """Return what the process holds in memory now; None where the system does not say."""
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), None)
