"""Going on with a run: finding it, and refusing to go on with another one by mistake."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from luthier.catalogue import catalogue
from luthier.checkpoint import Checkpoint
from luthier.config import selected
from luthier.errors import ConfigError
from luthier.report import versions
from luthier.settings import VERBS

log = logging.getLogger("luthier")
FREE = ("checkpoint", "evaluation", "log_every", "model.device", "pack_tokens", "plugins", "resume",
        "run_dir", "trackers")  # fmt: skip
"""What may differ when a run goes on: none of it changes what is learned."""
LONGER = ("epochs", "max_steps")
"""What may differ too, as a run may go on for longer; the schedule then follows the new length."""
SHOWN = 5


def config_of(run: str, overrides: Sequence[str]) -> DictConfig:
    """Return the config of the run in the folder `run`, changed as far as a run may be changed.

    Raises:
        ConfigError: There is no run, or an override would make it another one.
    """
    file = Path(run).expanduser() / "config.yaml"
    if not file.is_file():
        raise ConfigError(
            f"resume={run}: there is no run; expected a run folder with config.yaml and checkpoints/"
        )
    schema = OmegaConf.structured(VERBS["train"])
    OmegaConf.set_struct(schema, False)
    config = OmegaConf.merge(schema, OmegaConf.load(file))
    assert isinstance(config, DictConfig)
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        if not _may_change(key):
            raise ConfigError(
                f"{override.input_line}: resume={run} goes on with that run as it was; only "
                f"{', '.join((*FREE, *LONGER))} may change. For anything else, start a new run"
            )
        OmegaConf.update(config, key, override.value())
    config.run_dir, config.resume = str(file.parent), str(file.parent)
    return config


def check_config(config: DictConfig, checkpoint: Checkpoint) -> None:
    """Compare `config` with the one that made `checkpoint`.

    Raises:
        ConfigError: They would not train the same; every difference is shown, up to a few.
    """
    old = dict(_leaves(OmegaConf.to_container(OmegaConf.create(checkpoint.config()))))
    new = dict(_leaves(OmegaConf.to_container(config, resolve=True)))
    changes = [
        f"{key}: {old.get(key, 'absent')} → {new.get(key, 'absent')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _may_change(key)
    ]
    if changes:
        more = f" and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
        raise ConfigError(
            f"the config changed since {checkpoint.folder}: {'; '.join(changes[:SHOWN])}{more}. "
            "Take the change back, or start a new run in another run_dir"
        )
    for key in LONGER:
        if old.get(key) != new.get(key):
            log.warning("%s: %s → %s: the schedule follows the new length", key, old.get(key), new.get(key))


def check_rows(now: torch.Tensor, then: torch.Tensor, origin_of: Callable[[int], str]) -> None:
    """Compare the rows' hashes (n,) with those of the checkpoint; `origin_of` says where a row stands.

    Raises:
        ConfigError: The data changed; the first row that differs is named.
    """
    if torch.equal(now, then):
        return
    shared = min(len(now), len(then))
    differs = (now[:shared] != then[:shared]).nonzero()
    first = int(differs[0]) if len(differs) else shared
    where = f" ({origin_of(first)})" if first < len(now) else ""
    raise ConfigError(
        f"the data changed since the checkpoint: {len(then):,} rows then, {len(now):,} now; the first that "
        f"differs is row {first + 1:,}{where}. Bring the old data back, or start a new run"
    )


def lock_of(config: DictConfig) -> dict[str, str]:
    """Return the versions a run depends on: packages, and the plugins that its config uses."""
    plugins = [catalogue().find(kind.name, str(node.name)).plugin for kind, _, node in selected(config)]
    return {**versions(), **{plugin.distribution: plugin.version for plugin in plugins}}


def check_lock(now: dict[str, str], then: dict[str, str]) -> None:
    """Warn of versions that differ from the checkpoint's: results may then differ in the last digits."""
    changes = [
        f"{name} {then.get(name, 'absent')} → {now.get(name, 'absent')}"
        for name in sorted(now.keys() | then.keys())
        if now.get(name) != then.get(name)
    ]
    if changes:
        log.warning(
            "versions changed since the checkpoint, so it may not go on bit by bit: %s", ", ".join(changes)
        )


def _may_change(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in (*FREE, *LONGER))


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict) or not tree:
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
