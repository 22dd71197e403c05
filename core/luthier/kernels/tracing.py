"""Whether code runs for a plan, on shapes without values: what is done many times alike is then done once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_device: ContextVar[str | None] = ContextVar("_device", default=None)


@contextlib.contextmanager
def planned_for(device: str) -> Iterator[None]:
    """Plan for a `device` of that type in the block, wherever the tensors are."""
    token = _device.set(device)
    try:
        yield
    finally:
        _device.reset(token)


def planned_device() -> str | None:
    """Return the type of device that is planned for; None outside of a plan."""
    return _device.get()
