"""Everything before the first step of a run: methods built, model loaded, adapter attached, rows encoded."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig

from luthier import config as configs
from luthier.adapters import continued_adapter, train_tokens
from luthier.contracts import Adapter, Optimiser, Quantiser
from luthier.data import seen_trees, training_rows
from luthier.engine import TrainingRun, objective_of
from luthier.errors import ConfigError
from luthier.evaluation import check_reference, measured_in_training
from luthier.kernels import wants_wide
from luthier.models import load_model, quiet
from luthier.policy import give_head, policy_of
from luthier.registry import check_processes
from luthier.runs import seed_everything
from luthier.system import Processes


def prepared(config: DictConfig, run_dir: Path, processes: Processes) -> TrainingRun:
    """Return the run that `config` describes, its reference measured.

    Raises:
        LuthierError: Something a person can mend; what can be refused early is.
    """
    # Before a method is built: seeds what the model and its adapter start from.
    seed_everything(config.seed, processes.rank)
    optimiser: Optimiser = configs.build("optimiser", config.optimiser)
    check_processes(config.optimiser.name, optimiser, processes)
    if processes.count > 1 and ":" in config.model.device:
        raise ConfigError(
            f"model.device={config.model.device} would put {processes.count} processes on one device; "
            "leave it out: every process takes the one that its launcher gives it"
        )
    adapter: Adapter = configs.build("adapter", config.adapter)
    objective = objective_of(config)
    objective.check_run(config, processes)
    check_reference(config, objective.needs_reference)
    quantiser: Quantiser | None = configs.build("quantiser", config.quantiser) if config.quantiser else None
    base = adapter.trains_base
    loaded = load_model(config.model, train_base=base, quantiser=quantiser, train_adapter=not base)
    adapter = continued_adapter(adapter, config.adapter.name, loaded)
    if loaded.quantised and processes.sharded:
        raise ConfigError(
            "a quantised model cannot be sharded: launch without --use_fsdp, which gives every process "
            "the whole of it, or leave out quantiser"
        )
    rows = training_rows(config, loaded, objective)
    if adapter is not loaded.attached:
        adapter.attach(loaded.model, torch.Generator().manual_seed(config.seed))
        if not base:
            train_tokens(loaded.model, loaded.new_tokens)
    give_head(loaded, objective, config.objective.name, config.seed)
    if config.model.gradient_checkpointing:
        with quiet():
            loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
    # After the adapter, which may have changed the output head that the policy looks at.
    policy = policy_of(
        loaded, config.model.fused, wants_wide(config.model.wide_residual, objective.needs_reference)
    )
    if objective.needs_reference:
        trees = seen_trees(config, rows)
        policy.references = measured_in_training(config, run_dir, loaded, policy, trees, processes)
    return TrainingRun(
        config, run_dir, processes, adapter, optimiser, objective, quantiser, loaded, policy, rows
    )
