"""`merge`: one model out of several, tensor by tensor, in the memory that was allowed."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path

import torch
from omegaconf import DictConfig

from luthier import config as configs
from luthier.contracts import Merger
from luthier.errors import ConfigError, ModelError
from luthier.runs import SUMMARY, as_json, run_folder, versions, write_json, writing
from luthier.system import DTYPES, Processes
from luthier_plugins.commands.merge.io.adapters import merge_into_adapter
from luthier_plugins.commands.merge.io.folded import forget_folded
from luthier_plugins.commands.merge.io.inputs import MergeInput
from luthier_plugins.commands.merge.io.journal import Journal, digest_of
from luthier_plugins.commands.merge.io.shard_writer import Layout, ShardWriter, lay_out, write_index
from luthier_plugins.commands.merge.plan.limits import anonymous_bytes, check_disk, check_loading, room_for
from luthier_plugins.commands.merge.plan.options import check_options, opened_models
from luthier_plugins.commands.merge.plan.tensors import MergePlan, plan_merge
from luthier_plugins.commands.merge.plan.tokenizer import compare_tokenizers
from luthier_plugins.commands.merge.report.card import write_companions
from luthier_plugins.commands.merge.report.check import load_back, read_back
from luthier_plugins.commands.merge.report.result import MergeReport, finished_report, options_of, show_merge
from luthier_plugins.commands.merge.run.greedy import greedily
from luthier_plugins.commands.merge.run.pool import merge_all
from luthier_plugins.commands.merge.run.scores import check_tasks, task_scores

WORK = "merging"
"""Folder of a result that is not finished."""


def merge(config: DictConfig) -> MergeReport:
    """Merge `config.models` into ``run_dir/model``; print and return what became of them.

    Args:
        config: What `luthier.compose("merge", overrides)` returns.

    Raises:
        LuthierError: Something a person can mend; one line says what, where and how.
    """
    check_options(config)
    with run_folder(config, Processes()) as run_dir:
        if (run_dir / "model").exists() and not config.resume:
            raise ConfigError(f"run_dir={run_dir} holds a merged model already; choose another folder")
        merger: Merger = configs.build("merger", config.merger)
        with opened_models(config, merger) as (inputs, base):
            check_tasks(config, inputs)
            chosen = inputs
            if config.greedy:
                chosen = greedily(
                    config,
                    inputs,
                    run_dir,
                    lambda tried, out, work: merge_models(config, merger, tried, base, out, work),
                )
            report = _merged(config, merger, chosen, base, run_dir)
        left_out = tuple(model.label for model in inputs if model not in chosen)
        scores = task_scores(config, run_dir / "model") if config.tasks else {}
        report = dataclasses.replace(report, left_out=left_out, scores=scores)
        forget_folded(run_dir)
        write_json(run_dir / SUMMARY, {**as_json(report), "versions": versions()})
        show_merge(report)
        return report


def _merged(
    config: DictConfig, merger: Merger, inputs: list[MergeInput], base: MergeInput | None, run_dir: Path
) -> MergeReport:
    out = run_dir / "model"
    with writing(out, "make room, and go on with resume=auto"):
        if config.result == "adapter":
            return merge_into_adapter(config, merger, inputs, base, out)
        return merge_models(config, merger, inputs, base, out, run_dir / WORK)


def merge_models(
    config: DictConfig,
    merger: Merger,
    inputs: list[MergeInput],
    base: MergeInput | None,
    out: Path,
    work: Path,
) -> MergeReport:
    """Merge `inputs` into a full model in the folder `out`; `work` is where it is until it is whole.

    Where `out` holds this very merge already, that one's report is returned.

    Raises:
        ModelError: The models do not fit each other, or one has numbers that are not finite.
        ConfigError: There is too little memory or disk, or `out` holds another merge.
    """
    began = time.perf_counter()
    notes = compare_tokenizers(inputs)
    dtype = None if config.dtype == "auto" else DTYPES[config.dtype]
    plan = plan_merge(inputs, base, dtype, config.missing, config.check == "load")
    if base is None and config.base is not None:
        notes.append(f"merger={config.merger.name} looks at no base; base={config.base} is not read")
    tensors = {job.name: (job.dtype, job.shape) for job in plan.jobs}
    layout = lay_out(work, tensors, int(config.shard_gb * 1e9))
    digest = digest_of(config, inputs, base, layout)
    if (done := finished_report(out, digest)) is not None:
        return done
    report = MergeReport(
        model_dir=out,
        merger=options_of(config),
        models={model.label: str(model.folder) for model in inputs},
        base=None if base is None else str(base.folder),
        result="model",
        notes=(*plan.notes, *notes),
    )
    try:
        report = _written(config, merger, plan, layout, digest, report)
        report = dataclasses.replace(report, seconds=time.perf_counter() - began)
        dtypes = {job.dtype for job in plan.jobs if job.dtype.is_floating_point}
        only = dtypes.pop() if len(dtypes) == 1 else None
        write_companions(work, inputs, base, report, digest, only, plan.untied)
        if config.check == "load" and plan.skeleton is not None:
            load_back(work, plan.skeleton)
    except ModelError:
        shutil.rmtree(work, ignore_errors=True)  # going on would end here again
        raise
    Journal.forget(work)
    work.rename(out)
    return report


def _written(
    config: DictConfig, merger: Merger, plan: MergePlan, layout: Layout, digest: str, report: MergeReport
) -> MergeReport:
    """Write the weights; return the report with what became of them."""
    work = layout.folder
    threads = config.threads or min(torch.get_num_threads(), max(len(plan.jobs), 1))
    keep = room_for(plan.jobs, merger, config.max_memory, threads, anonymous_bytes())
    if config.check == "load":
        check_loading(layout.total, config.max_memory, anonymous_bytes())
    check_disk(work, layout.total)
    journal = Journal(work, digest)
    left = [job for job in plan.jobs if job.name not in journal.done]
    writer = ShardWriter(layout)
    try:
        tensors = merge_all(plan.jobs, merger, keep, threads, writer, journal)
        writer.flush()
    finally:
        writer.close()
    write_index(work, layout)
    read_back(layout, writer.sums, threads)
    return dataclasses.replace(
        report,
        tensors=tuple(tensors),
        bytes_read=sum(job.bytes_read for job in left),
        bytes_written=sum(job.count * job.dtype.itemsize for job in left),
    )
