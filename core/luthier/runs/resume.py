"""Going on with a run: finding it, and refusing to go on with another one by mistake."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from luthier.config import check_overrides, renamed_options, selected
from luthier.errors import ConfigError
from luthier.registry import catalogue, command
from luthier.runs.folder import finished
from luthier.runs.report import TrainResult, result_of, versions

log = logging.getLogger("luthier")
FREE = ("checkpoint", "evaluation", "log_every", "model.device", "model.shape", "pack_tokens", "plugins",
        "resume", "run_dir", "stages", "trackers")  # fmt: skip
"""What may differ when a run goes on: none of it changes what is learned."""
LONGER = ("epochs", "max_steps")
"""What may differ too, as a run may go on for longer; the schedule then follows the new length."""
SHOWN = 5


def resumed_run(overrides: Sequence[str]) -> str | None:
    """Return the run folder that ``resume=FOLDER`` names; None for ``auto`` or without it."""
    named = [key.removeprefix("resume=").strip("'\"") for key in overrides if key.startswith("resume=")]
    return named[-1] if named and named[-1] not in ("auto", "null", "") else None


def resumed_config(overrides: Sequence[str]) -> DictConfig | None:
    """Return the config of the run that ``resume=FOLDER`` names, changed by the others; None without it.

    Raises:
        ConfigError: There is no run, or an override would make it another one.
    """
    run = resumed_run(overrides)
    if run is None:
        return None
    check_overrides(overrides)
    changes = [override for override in overrides if not override.startswith("resume=")]
    file = Path(run).expanduser() / "config.yaml"
    if not file.is_file():
        raise ConfigError(
            f"resume={run}: there is no run; expected a run folder with config.yaml and checkpoints/"
        )
    config = _of_training(file)
    for override in OverridesParser.create().parse_overrides(changes):
        key = override.key_or_group
        if not _may_change(key):
            raise ConfigError(
                f"{override.input_line}: resume={run} goes on with that run as it was; only "
                f"{', '.join((*FREE, *LONGER))} may change. For anything else, start a new run"
            )
        OmegaConf.update(config, key, override.value())
    config.run_dir, config.resume = str(file.parent), str(file.parent)
    return config


def _of_training(file: Path) -> DictConfig:
    """Return the config of a training run that `file` holds."""
    schema = OmegaConf.structured(command("train").options)
    OmegaConf.set_struct(schema, False)
    try:
        config = OmegaConf.merge(schema, _now(OmegaConf.load(file)))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"{file} cannot be read as a run's config: {reason}; each of its checkpoints holds a copy"
        ) from error
    assert isinstance(config, DictConfig)
    if missing := [str(key) for key in config if OmegaConf.is_missing(config, str(key))]:
        raise ConfigError(f"{file} is not that of a training run: {', '.join(missing)} missing")
    return config


def _now(config: Any) -> DictConfig:
    """Return the config of a run, maybe an older one, with the names that its options have now."""
    assert isinstance(config, DictConfig)
    pairs = list(renamed_options(command("train").options, ""))
    for kind, where, node in selected(config):
        pairs += renamed_options(catalogue().find(kind.name, str(node.name)).cls, f"{where}.")
    for old, new in pairs:
        parent, _, name = old.rpartition(".")
        holder = OmegaConf.select(config, parent) if parent else config
        if isinstance(holder, DictConfig) and name in holder:
            OmegaConf.update(config, new, holder.pop(name), force_add=True)
    return config


def completed(config: DictConfig, run_dir: Path) -> TrainResult | None:
    """Return the result that `run_dir` holds if it is all that `config` asks for.

    Raises:
        ConfigError: It is that of another run.
    """
    summary = finished(run_dir) if config.resume else None
    if summary is None:
        return None
    if not any((run_dir / "model").glob("*.safetensors")):
        log.warning("%s has no weights any more: they are written again from the last checkpoint", run_dir)
        return None
    _of_training(run_dir / "config.yaml")
    changed = check_config(config, (run_dir / "config.yaml").read_text(encoding="utf-8"), run_dir)
    return None if changed.keys() & {*LONGER, "evaluation.patience"} else result_of(summary)


def check_config(config: DictConfig, before: str, made: Path) -> dict[str, str]:
    """Compare `config` with the YAML `before`, which `made` was made with; return what differs by key.

    Raises:
        ConfigError: They would not train the same; every difference is shown, up to a few.
    """
    old = dict(_leaves(OmegaConf.to_container(_now(OmegaConf.create(before)))))
    new = dict(_leaves(OmegaConf.to_container(config, resolve=True)))
    differing = {
        key: f"{key}: {old.get(key, 'absent')} → {new.get(key, 'absent')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }
    changes = [change for key, change in differing.items() if not _may_change(key)]
    if changes:
        more = f" and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
        raise ConfigError(
            f"the config changed since {made}: {'; '.join(changes[:SHOWN])}{more}. "
            "Take the change back, or start a new run in another run_dir"
        )
    return differing


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
