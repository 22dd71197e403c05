"""`merge`: one model out of several, tensor by tensor, in the memory that was allowed."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from luthier import config as configs
from luthier.errors import ConfigError, unknown
from luthier.merge_adapters import merge_into_adapter
from luthier.merge_card import write_companions
from luthier.merge_check import check_result
from luthier.merge_greedy import greedily
from luthier.merge_inputs import MergeInput, labelled, open_input
from luthier.merge_journal import Journal, digest_of
from luthier.merge_plan import MISSING, MergePlan, check_disk, plan_merge, room_for
from luthier.merge_pool import merge_all
from luthier.merge_report import MergeReport, show_merge
from luthier.merge_scores import check_tasks, task_scores
from luthier.merger import Merger
from luthier.parallel import Processes
from luthier.peak import anonymous_bytes
from luthier.precision import DTYPES
from luthier.report import as_json, versions, write_json
from luthier.run_folder import SUMMARY, finished, run_folder
from luthier.shard_writer import ShardWriter, lay_out, write_index

RESULTS = ("model", "adapter")
WORK = "merging"
"""Folder of a result that is not finished."""


def merge(config: DictConfig) -> MergeReport:
    """Merge `config.models` into ``run_dir/model``; print and return what became of them.

    Args:
        config: What `luthier.compose("merge", overrides)` returns.

    Raises:
        LuthierError: Something a person can mend; one line says what, where and how.
    """
    _check(config)
    with run_folder(config, Processes()) as run_dir:
        if (run_dir / "model").exists():
            raise ConfigError(f"run_dir={run_dir} holds a merged model already; choose another folder")
        merger: Merger = configs.build("merger", config.merger)
        inputs, base = _open(config, merger)
        check_tasks(config)
        try:
            chosen = greedily(config, merger, inputs, base, run_dir) if config.greedy else inputs
            report = _merged(config, merger, chosen, base, run_dir)
        finally:
            for one in (*inputs, *([base] if base else [])):
                one.checkpoint.close()
        left_out = tuple(one.label for one in inputs if one not in chosen)
        scores = task_scores(config, run_dir / "model") if config.tasks else {}
        report = dataclasses.replace(report, left_out=left_out, scores=scores)
        write_json(run_dir / SUMMARY, {**as_json(report), "versions": versions()})
        show_merge(report)
        return report


def _check(config: DictConfig) -> None:
    """Refuse options that mean nothing."""
    for key, known in (("missing", MISSING), ("result", RESULTS)):
        if config[key] not in known:
            raise ConfigError(unknown(key, str(config[key]), known))
    if config.dtype != "auto" and config.dtype not in DTYPES:
        raise ConfigError(unknown("dtype", str(config.dtype), ("auto", *DTYPES)))
    for key in ("max_memory", "shard_gb", "threads", "rank"):
        if config[key] is not None and not config[key] > 0:
            raise ConfigError(f"{key}={config[key]} must be positive")
    if config.rank is not None and config.result != "adapter":
        raise ConfigError(f"rank={config.rank} is of an adapter; set result=adapter too")
    if config.greedy and not config.tasks:
        raise ConfigError("greedy=true needs held-out tasks to score with: +data@tasks.NAME=SOURCE")
    if config.greedy and config.result == "adapter":
        raise ConfigError("greedy=true merges models; choose result=model, or one merge without greedy")
    if config.get("resume") and (done := finished(Path(config.run_dir))):
        raise ConfigError(f"run_dir={config.run_dir} is finished: {done.get('model_dir')}")


def _open(config: DictConfig, merger: Merger) -> tuple[list[MergeInput], MergeInput | None]:
    """Open the models, in an order that the command line has no say in, and the base."""
    given: Any = (
        OmegaConf.to_container(config.models) if OmegaConf.is_config(config.models) else config.models
    )
    paths = labelled(given)
    labels = sorted(paths) if merger.symmetric else list(paths)
    if len(labels) < merger.least_inputs:
        raise ConfigError(
            f"merger={config.merger.name} needs {merger.least_inputs} models at least, not {len(labels)}"
        )
    merger.check(labels)
    inputs = [open_input(f"models.{label}", paths[label]) for label in labels]
    inputs = [dataclasses.replace(one, label=label) for one, label in zip(inputs, labels, strict=True)]
    if config.base is not None:
        return inputs, open_input("base", str(config.base))
    if not merger.needs_base:
        return inputs, None
    folders = {one.checkpoint.folder for one in inputs}
    if len(folders) > 1 or not all(one.adapter for one in inputs):
        raise ConfigError(
            f"merger={config.merger.name} works on differences to the model that all were tuned from: "
            "set base=MODEL"
        )
    return inputs, open_input("base", str(folders.pop()))


def _merged(
    config: DictConfig, merger: Merger, inputs: list[MergeInput], base: MergeInput | None, run_dir: Path
) -> MergeReport:
    if config.result == "adapter":
        return merge_into_adapter(config, merger, inputs, base, run_dir)
    return merge_models(config, merger, inputs, base, run_dir / "model", run_dir / WORK)


def merge_models(
    config: DictConfig,
    merger: Merger,
    inputs: list[MergeInput],
    base: MergeInput | None,
    out: Path,
    work: Path,
) -> MergeReport:
    """Merge `inputs` into a full model in the folder `out`; `work` is where it is until it is whole.

    Raises:
        ModelError: The models do not fit each other, or one has numbers that are not finite.
        ConfigError: There is too little memory or disk.
    """
    began = time.perf_counter()
    used = base if merger.needs_base else None
    plan = plan_merge(inputs, used, None if config.dtype == "auto" else DTYPES[config.dtype], config.missing)
    notes = list(plan.notes)
    if base is not None and used is None:
        notes.append(f"merger={config.merger.name} looks at no base; base={config.base} is not read")
    threads = config.threads or min(torch.get_num_threads(), len(plan.jobs))
    keep = room_for(plan.jobs, merger, config.max_memory, threads, anonymous_bytes())
    layout = lay_out(
        work, {job.name: (job.dtype, job.shape) for job in plan.jobs}, int(config.shard_gb * 1e9)
    )
    journal = Journal(work, digest_of(config, inputs, used, layout))
    check_disk(work, 0 if journal.done else layout.total)
    writer = ShardWriter(layout)
    try:
        tensors = merge_all(plan.jobs, merger, keep, threads, writer, journal)
        writer.flush()
    finally:
        writer.close()
    write_index(work, layout)
    report = MergeReport(
        model_dir=out,
        merger=_options(config),
        models={one.label: str(one.folder) for one in inputs},
        base=None if used is None else str(used.folder),
        result="model",
        tensors=tuple(tensors),
        bytes_read=sum(
            job.count * one.tensors[job.name].dtype.itemsize for job in plan.jobs for one in job.readers
        ),
        bytes_written=layout.total,
        seconds=time.perf_counter() - began,
        notes=tuple(notes),
    )
    _finish(config, plan, inputs, used, report, work, journal)
    work.rename(out)
    return report


def _finish(
    config: DictConfig,
    plan: MergePlan,
    inputs: list[MergeInput],
    base: MergeInput | None,
    report: MergeReport,
    work: Path,
    journal: Journal,
) -> None:
    dtypes = {job.dtype for job in plan.jobs if job.dtype.is_floating_point}
    write_companions(work, inputs, base, report, dtypes.pop() if len(dtypes) == 1 else None)
    check_result(work, plan, config.max_memory)
    journal.close()


def _options(config: DictConfig) -> dict[str, Any]:
    options: Any = OmegaConf.to_container(config.merger)
    return dict(options)
