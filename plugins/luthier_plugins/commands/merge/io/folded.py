"""Adapters of more than single linear layers, folded into their base before they are merged.

New rows of an embedding, whole modules and experts may be stored in other shapes, and under other names, than
the base has them; the folded model has what its family stores.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch
from safetensors import safe_open

from luthier.adapters import CONFIG, PREFIX, WEIGHTS, PeftAdapter, fold
from luthier.config import ModelConfig
from luthier.models import Source, adapter_readers, peft_kind
from luthier.system import read_table

OPTIONS = ("modules_to_save", "trainable_token_indices", "target_parameters")
FOLDER = "folded"
"""Of a run: what was folded for it, until it is finished."""


def changes_parameters(adapter: Path) -> bool:
    """Whether the adapter in the folder `adapter` is more than changes of linear layers, each by itself."""
    if not (adapter / WEIGHTS).is_file():
        return False  # which is said where it is read
    config = read_table(adapter / CONFIG)
    cls = adapter_readers().get(peft_kind(config))
    if cls is not None and issubclass(cls, PeftAdapter) and cls.peft_shared:
        return True
    if any(config.get(option) for option in OPTIONS) or config.get("bias", "none") != "none":
        return True
    with safe_open(adapter / WEIGHTS, framework="pt") as stored:
        names = [name.removeprefix(PREFIX) for name in stored.keys()]  # noqa: SIM118
    places = {name.rpartition(".lora_")[0] for name in names}
    return any(
        ".lora_embedding_" in name or (name.endswith((".weight", ".bias")) and _is_plain(name, places))
        for name in names
    )


def _is_plain(name: str, places: set[str]) -> bool:
    """Whether a tensor is a module's own: no adapter's, and no copy of what one lies on."""
    return not any(place and name.startswith(f"{place}.") for place in places)


def folded(source: Source, work: Path) -> Path:
    """Return a folder below `work` with the model of `source`, its adapter folded in; made once.

    Raises:
        ModelError: The adapter does not fit.
    """
    assert source.adapter is not None
    stat = (source.adapter / WEIGHTS).stat()
    key = hashlib.sha256(f"{source} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = work / FOLDER / key
    if not folder.is_dir():
        # What imports transformers takes seconds, and few merges need it.
        from transformers import AutoConfig

        from luthier.models import from_pretrained, load_model
        from luthier_toolkits.saving import save_model

        place = ModelConfig(path=source.base, adapter=str(source.adapter), dtype="float32", device="cpu")
        loaded = load_model(place, train_base=False)
        fold(loaded.model)
        dtype: torch.dtype | None = from_pretrained(AutoConfig, source.base).dtype
        save_model(loaded.model, loaded.tokenizer, folder, dtype or torch.float32)
    return folder


def forget_folded(work: Path) -> None:
    """Remove what was folded for a run: it is finished."""
    shutil.rmtree(work / FOLDER, ignore_errors=True)
