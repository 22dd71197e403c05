"""`evaluate`, and the parts of an evaluation that `train` builds too."""

from __future__ import annotations

import dataclasses
from typing import Any

from omegaconf import DictConfig, OmegaConf

from luthier import config as configs
from luthier.contracts import DataSource, Objective
from luthier.data import Batches, Encoded, source_rows
from luthier.evaluation.evaluation import Evaluator
from luthier.evaluation.options import EvaluationConfig
from luthier.evaluation.reference_pass import check_reference, measured_in_evaluation
from luthier.kernels import wants_wide
from luthier.models import LoadedModel, load_model
from luthier.policy import ModelPolicy, check_head, policy_of
from luthier.runs import EvaluationReport, as_json, hooks, model_line, run_folder, versions, write_json
from luthier.system import Processes
from luthier.text import Codec


def evaluate(config: DictConfig) -> EvaluationReport:
    """Measure a model on the rows of `config.data`, and leave answers and summary in the run folder.

    Raises:
        LuthierError: Something a person can mend; one line says what, where and how.
    """
    # Nothing trains, so nothing needs to be in parts.
    processes = dataclasses.replace(Processes.launched(), sharded=False)
    with run_folder(config, processes) as run_dir:
        quantiser = configs.build("quantiser", config.quantiser) if config.quantiser else None
        loaded = load_model(config.model, train_base=False, quantiser=quantiser)
        objective: Objective = configs.build("objective", config.objective)
        objective.check_evaluation(str(config.objective.name))
        check_head(loaded, objective, config.objective.name)
        check_reference(config, objective.needs_reference)
        source, rows = source_rows(config, "data", loaded, objective)
        held_out = source, rows.completed(objective, config.seed, config.unusable)
        wide = wants_wide(config.model.wide_residual, objective.needs_reference)
        policy = policy_of(loaded, config.model.fused, wide)
        if objective.needs_reference:
            trees = [held_out[1].trees]
            policy.references = measured_in_evaluation(config, run_dir, loaded, policy, trees, processes)
        evaluator = evaluator_of(config, policy, loaded, objective, held_out, processes)
        assert evaluator is not None
        hook = hooks(processes)
        hook.after_header(lines=[model_line(loaded), *evaluator.held_out.lines("data")])
        report = evaluator.report(step=0, answer=True)
        hook.after_evaluation(report=report)
        if processes.main:
            objective.draw(report.metrics, run_dir)
            write_json(run_dir / "summary.json", {**as_json(report), "versions": versions()})
        return report


def evaluator_of(
    config: DictConfig,
    policy: ModelPolicy,
    loaded: LoadedModel,
    objective: Objective,
    held_out: tuple[DataSource, Encoded] | None,
    processes: Processes,
    batches: Batches | None = None,
) -> Evaluator | None:
    """Return what measures `policy` on the `held_out` rows, if there are any."""
    if held_out is None:
        return None
    values: Any = OmegaConf.to_container(config.evaluation)
    measured = policy, objective, Codec(loaded.tokenizer), *held_out, EvaluationConfig(**values)
    return Evaluator(*measured, config.pack_tokens, processes, batches)
