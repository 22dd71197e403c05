"""The reference pass: every completion that a run will see, measured before the first step.

As all of it is done before a weight moves, the reference that is the policy's own start needs no copy of the
model, whatever trains; another checkpoint is freed again before training begins.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from luthier.adapters import adapted, adapter_off
from luthier.config import ModelConfig
from luthier.errors import ConfigError, DataError, LuthierError, ModelError
from luthier.kernels import is_wide
from luthier.models import LoadedModel, find_source, load_model
from luthier.policy import (
    ModelPolicy,
    References,
    fingerprint,
    keys_of,
    load_references,
    other_references,
    policy_of,
    save_references,
)
from luthier.runs import hooks
from luthier.system import Processes
from luthier.trees import Pack, Tree, cut

log = logging.getLogger("luthier")

WINDOW = 512
"""Trees that are packed together."""
SAVE_EVERY = 60.0
"""Seconds between two savings."""


def measured_in_training(
    config: DictConfig, run_dir: Path, loaded: LoadedModel, policy: ModelPolicy,
    trees: Sequence[Sequence[Tree]], processes: Processes,
) -> References:  # fmt: skip
    """Return the references of `trees` for a run: the policy as it is now, or ``reference.model``.

    Raises:
        ModelError: The reference has another vocabulary, or is not the one that the run began with.
    """
    if config.reference.model:
        return _of_another(config, run_dir, loaded, trees, processes)
    # An adapter that was loaded is part of where training starts; one that was just made changes nothing yet.
    start = adapter_off(loaded.model) if loaded.adapter is None else contextlib.nullcontext()
    with start:
        return _Pass(config, run_dir, processes).run(policy, loaded, trees)


def measured_in_evaluation(
    config: DictConfig, run_dir: Path, loaded: LoadedModel, policy: ModelPolicy,
    trees: Sequence[Sequence[Tree]], processes: Processes,
) -> References:  # fmt: skip
    """Return the references of `trees` where nothing trains.

    It is ``reference.model``; or what the run that trained the adapter compared with; or the adapter's base.

    Raises:
        ModelError: There is neither.
    """
    if not config.reference.model and (start := _start_of_run(loaded)):
        config.reference.model = start
        log.info("compared with %s, as in the run that trained the adapter", start)
    if config.reference.model:
        return _of_another(config, run_dir, loaded, trees, processes)
    if not adapted(loaded.model):
        raise ModelError(
            f"objective={config.objective.name} compares with a reference, and {loaded.name} carries no "
            "adapter that could be switched off: give reference.model=FOLDER"
        )
    with adapter_off(loaded.model):
        return _Pass(config, run_dir, processes).run(policy, loaded, trees)


def _of_another(
    config: DictConfig, run_dir: Path, loaded: LoadedModel, trees: Sequence[Sequence[Tree]],
    processes: Processes,
) -> References:  # fmt: skip
    other = load_model(reference_options(config), train_base=False)
    if other.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
        sizes = (len(model.tokenizer.get_vocab()) for model in (other, loaded))
        raise ModelError(
            "reference.model={}: its vocabulary ({:,} tokens) is not the model's ({:,}); a reference must "
            "read the same token ids".format(config.reference.model, *sizes)
        )
    return _Pass(config, run_dir, processes).run(
        policy_of(other, config.model.fused, is_wide(loaded.model)), other, trees
    )


def check_reference(config: DictConfig, needed: bool) -> None:
    """Check what can be checked of a reference before any row is read; warn where it is not `needed`.

    Raises:
        ConfigError: `reference.cache` is no folder.
        ModelError: `reference.model` is not there.
    """
    if not needed:
        for option in (name for name in ("model", "cache") if config.reference[name]):
            log.warning(
                "reference.%s is not read: objective=%s has no reference", option, config.objective.name
            )
        return
    cache = config.reference.cache
    if cache and Path(cache).expanduser().is_file():
        raise ConfigError(f"reference.cache={cache} is a file; expected a folder, which may be new")
    if config.reference.model:
        try:
            find_source(reference_options(config))
        except LuthierError as error:
            raise ModelError(str(error).replace("model.path", "reference.model")) from error


def reference_options(config: DictConfig) -> Any:
    """Return the options of the model with ``reference.model`` in its place."""
    given = {"path": config.reference.model, "gguf_package": None, "adapter": None}
    options = OmegaConf.merge(config.model, given)
    options.shape = {}
    return options


def _start_of_run(loaded: LoadedModel) -> str | None:
    """Return what the run that trained the adapter compared with, if it was not the adapter's bare base."""
    if loaded.adapter is None:
        return None
    try:
        run = OmegaConf.load(loaded.adapter.parent / "config.yaml")
        other = OmegaConf.select(run, "reference.model") or OmegaConf.select(run, "model.adapter")
        path = OmegaConf.select(run, "model.path")
        if other or not path:
            return other or None
        carries = find_source(ModelConfig(path=path)).adapter is not None
    except (OSError, YAMLError, OmegaConfBaseException, LuthierError):
        return None
    return str(path) if carries else None


def _computed(loaded: LoadedModel) -> tuple[object, ...]:
    """Return what a model computes by beside its weights: config, dtypes, and the options of its adapter."""
    settings = {
        key: value
        for key, value in loaded.model.config.to_dict().items()
        if not key.startswith("_") and key not in ("transformers_version", "architectures", "dtype")
    }
    on = any(layer.enabled for layer in adapted(loaded.model).values())
    options = repr(loaded.attached) if on and loaded.attached else ""
    numbers = loaded.dtype, loaded.autocast_dtype, is_wide(loaded.model)
    return *numbers, json.dumps(settings, sort_keys=True, default=str), options


@dataclass(frozen=True)
class _Pass:
    """A pass over what is not remembered yet."""

    config: DictConfig
    run_dir: Path
    processes: Processes

    @torch.no_grad()
    def run(self, policy: ModelPolicy, loaded: LoadedModel, trees: Sequence[Sequence[Tree]]) -> References:
        folder = Path(self.config.reference.cache or self.run_dir)
        model = fingerprint(policy.model, *_computed(loaded))
        known = self.processes.same(self._known(folder, model) if self.processes.main else None)
        assert known is not None
        left = known.missing(itertools.chain.from_iterable(trees))
        total = sum(len(tree.branches) for tree in known.missing(itertools.chain.from_iterable(trees)))
        policy.model.eval()
        hook, sums, saved = hooks(self.processes), dict[int, float](), time.monotonic()
        try:
            while window := list(itertools.islice(left, WINDOW)):
                sums |= self._measured(policy, window)
                hook.while_measuring(what="reference", done=len(sums), total=total)
                if time.monotonic() - saved > SAVE_EVERY:
                    self._save(known.plus(sums), folder, model)
                    saved = time.monotonic()
        finally:  # Ctrl-C as well: the same command goes on from there
            if sums:
                self._save(known.plus(sums), folder, model)
        return known.plus(sums)

    def _save(self, values: References, folder: Path, model: str) -> None:
        if self.processes.main:
            save_references(values, folder, model)

    def _known(self, folder: Path, model: str) -> References:
        stored = load_references(folder, model)
        if len(stored.keys) or not other_references(folder, model):
            return stored
        if self.config.get("resume") and not self.config.reference.cache:
            raise ModelError(
                f"{folder} holds what another reference gave: the model is not the one that this run began "
                "with; start a new run in another run_dir"
            )
        log.warning("%s remembers another reference: this one is measured anew", folder)
        return stored

    def _measured(self, policy: ModelPolicy, trees: Sequence[Tree]) -> dict[int, float]:
        """Return what all processes measured of `trees`; a fault of one is raised in each."""
        values: dict[int, float] = {}
        faults = []
        for indices in self.processes.share(cut(trees, self.config.pack_tokens)):
            pack = [trees[i] for i in indices]
            sums = policy.logprobs(Pack.of(pack, policy.device)).sums()
            keys = [key for tree in pack for key in keys_of(tree)]
            values.update(zip(keys, sums.tolist(), strict=True))
            faults += [] if bool(torch.isfinite(sums).all()) else [_not_finite(pack, sums)]
        parts = self.processes.gather((values, faults))
        if all_faults := [fault for _, part_faults in parts for fault in part_faults]:
            raise DataError(all_faults[0])
        return {key: value for part_values, _ in parts for key, value in part_values.items()}


def _not_finite(pack: Iterable[Tree], sums: torch.Tensor) -> str:
    owners = [tree for tree in pack for _ in tree.branches]
    bad = [
        (tree.origin, float(value)) for tree, value in zip(owners, sums, strict=True) if not value.isfinite()
    ]
    rows = ", ".join(dict.fromkeys(origin for origin, _ in bad))
    return (
        f"{rows}: the reference gives a completion the log-probability {bad[0][1]}, so nothing can be "
        "compared with it; drop these rows, or compute in model.dtype=float32"
    )
