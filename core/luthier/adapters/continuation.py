"""What training starts from where the model carries an adapter: that adapter, which goes on training."""

from __future__ import annotations

import logging
from pathlib import Path

from luthier.contracts import Adapter, options_of
from luthier.errors import ConfigError
from luthier.models import LoadedModel
from luthier.registry import catalogue

log = logging.getLogger("luthier")


def continued_adapter(adapter: Adapter, name: str, loaded: LoadedModel) -> Adapter:
    """Return what trains: `adapter`, or the one that `loaded` carries, with the options it was made with.

    Raises:
        ConfigError: They are of two kinds.
    """
    there = loaded.attached
    if there is None:
        return adapter
    assert loaded.adapter is not None
    folder = loaded.adapter
    if loaded.new_tokens:
        raise ConfigError(
            f"new tokens cannot join the adapter in {_run_of(folder)}: leave out model.new_tokens and "
            f"model.resize, or make one model of it first: luthier fold {_run_of(folder)} FOLDER"
        )
    if type(adapter) is not type(there):
        known = {method.cls: method.name for method in catalogue().all() if method.kind == "adapter"}
        raise ConfigError(
            f"{_run_of(folder)} is an adapter of the kind {known.get(type(there), there.peft_kind)}, and "
            f"adapter={name} cannot go on with it: choose its kind, or make one model of both first: "
            f"luthier fold model.path={_run_of(folder)} out=FOLDER"
        )
    log.info("the adapter in %s goes on training", folder)
    for option, field in options_of(type(adapter)).items():
        asked, made = getattr(adapter, option), getattr(there, option)
        # What is left at its default was not asked for; targets are known by the layers that have tensors.
        if option != "targets" and asked not in (made, field.default):
            log.warning(
                "adapter.%s=%s is not used: the adapter in %s was made with %s",
                option, asked, _run_of(folder), made,
            )  # fmt: skip
    return there


def _run_of(folder: Path) -> Path:
    """Return the folder as a person calls it: the run rather than the result in it."""
    return folder.parent if folder.name == "model" else folder
