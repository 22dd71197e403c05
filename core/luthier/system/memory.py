"""Memory as it is measured: the whole process's peak, and what a training run has in use."""

from __future__ import annotations

import ctypes
import functools
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_MAPS, _STATM = Path("/proc/self/maps"), Path("/proc/self/statm")
_before: dict[torch.device, float] = {}
"""The peak of an accelerator up to the last `Watch` on it, MiB."""
_ALWAYS = 30
"""Looks that are always taken; each costs some milliseconds."""


def peak_memory_mb(device: torch.device) -> float:
    """Return the whole process's peak in MiB: allocated on an accelerator, resident on CPU."""
    if device.type == "cuda":
        return max(_allocated_mb(device), _before.get(device, 0.0))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 2**10


def _allocated_mb(device: torch.device) -> float:
    return float(torch.cuda.max_memory_allocated(device)) / 2**20


class Watch:
    """The most memory in use while a run trains.

    On CUDA the allocator knows it. On CPU it is what is resident less what the C library keeps of freed
    blocks, which no plan can know, seen at the moments `look` is called: when activations or gradients are at
    their most.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._highest, self._largest, self._looks = device, 0.0, 0, 0
        if device.type == "cuda":
            _before[device] = peak_memory_mb(device)
            torch.cuda.reset_peak_memory_stats(device)

    def look(self, tokens: int) -> None:
        """Look now, a pack of `tokens` being in memory; passed over if larger ones were seen."""
        if self._device.type == "cuda" or (self._looks >= _ALWAYS and tokens < self._largest):
            return
        self._looks, self._largest = self._looks + 1, max(self._largest, tokens)
        self._highest = max(self._highest, in_use() or 0.0)

    @property
    def highest_mb(self) -> float | None:
        """The most that was seen, MiB; None where the system does not say."""
        if self._device.type == "cuda":
            return _allocated_mb(self._device)
        return self._highest / 2**20 or None


def in_use() -> float | None:
    """Return the bytes of this process that are in use; None where the system does not say."""
    free = _free()
    try:
        resident = float(_STATM.read_text(encoding="utf-8").split()[1]) * resource.getpagesize()
        return None if free is None else resident - max(0.0, free() - _given_back())
    except OSError:
        return None


def _given_back() -> float:
    """Return the bytes of the heap that are not resident: free ones that were given back."""
    for line in _MAPS.read_text(encoding="utf-8").splitlines():
        if line.endswith("[heap]"):
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            pages = ctypes.create_string_buffer((end - start) // resource.getpagesize())
            if ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(end - start), pages) == 0:
                return float(pages.raw.count(b"\0")) * resource.getpagesize()
    return 0.0


class _Mallinfo(ctypes.Structure):
    # Eight sizes, then free bytes, then those at the end that could be given back.
    _fields_ = [*((f"_{number}", ctypes.c_size_t) for number in range(8)), ("free", ctypes.c_size_t),
                ("_last", ctypes.c_size_t)]  # fmt: skip


@functools.cache
def _free() -> Callable[[], float] | None:
    """Return what says how many bytes glibc keeps of freed blocks; None for another C library."""
    try:
        info = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return None
    info.restype = _Mallinfo
    return lambda: float(info().free)
