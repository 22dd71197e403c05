"""Which registered adapter reads a folder that an adapter was saved in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.contracts import Adapter
from luthier.errors import ModelError, PluginError, unknown
from luthier.models.model_source import ADAPTER_CONFIG
from luthier.registry import Registered, catalogue
from luthier.system import read_table


def adapter_readers() -> dict[str, type[Adapter]]:
    """Return the registered adapter classes that read PEFT folders, by PEFT kind.

    Raises:
        PluginError: Two of them read the same kind.
    """
    readers: dict[str, Registered] = {}
    for method in catalogue().all():
        if method.kind == "adapter" and method.cls.peft_kind is not None:
            first = readers.setdefault(method.cls.peft_kind, method)
            if first is not method:
                raise PluginError(f"PEFT kind {method.cls.peft_kind} is read by {first} and by {method}; "
                                  f"set LUTHIER_BLOCKED={method.plugin.entry.name}")  # fmt: skip
    return {kind: method.cls for kind, method in readers.items()}


def reader_of(folder: Path, adapters: Mapping[str, type[Adapter]]) -> type[Adapter]:
    """Return the one of `adapters`, by PEFT kind, that reads `folder`.

    Raises:
        ModelError: None does, or the folder is damaged.
    """
    if (kind := peft_kind(read_table(folder / ADAPTER_CONFIG))) not in adapters:
        raise ModelError(f"{folder}: {unknown('PEFT kind', kind, adapters)}")
    return adapters[kind]


def peft_kind(config: Mapping[str, Any]) -> str:
    """Return the kind of adapter that an ``adapter_config.json`` describes: see `Adapter.peft_kind`."""
    flags = sorted(
        key for key, value in config.items() if key.startswith("use_") and value and key != "use_rslora"
    )
    return "+".join([str(config.get("peft_type")), *flags])
