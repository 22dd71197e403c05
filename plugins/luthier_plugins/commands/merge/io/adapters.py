"""Adapters merged into an adapter: always by what they add to the weights, never factor by factor."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from omegaconf import DictConfig
from safetensors.torch import save_file

from luthier.adapters import CONFIG, PREFIX, WEIGHTS, AdaptedLinear, read_adapter
from luthier.contracts import Merger
from luthier.errors import ConfigError, ModelError
from luthier.models import adapter_readers
from luthier.system import written_whole
from luthier_plugins.commands.merge.io.inputs import BASE, WEIGHT, MergeInput
from luthier_plugins.commands.merge.io.journal import digest_of
from luthier_plugins.commands.merge.plan.limits import anonymous_bytes, room_for
from luthier_plugins.commands.merge.plan.tensors import plan_merge
from luthier_plugins.commands.merge.plan.tokenizer import compare_tokenizers, copy_tokenizer
from luthier_plugins.commands.merge.report.card import write_report
from luthier_plugins.commands.merge.report.result import MergeReport, finished_report, options_of
from luthier_plugins.commands.merge.run.tensor import RUN, MergedTensor, Reading, TensorJob, groups_of

OVERSAMPLED, ITERATIONS = 16, 6


@dataclass(frozen=True)
class Factors:
    """A change of a weight, B A.

    Attributes:
        b: (d_out, r).
        a: (r, d_in).
        discarded: Share of ‖Δ‖² that the rank cut away.
    """

    b: torch.Tensor
    a: torch.Tensor
    discarded: float = 0.0


@torch.no_grad()
def merge_into_adapter(
    config: DictConfig, merger: Merger, inputs: list[MergeInput], base: MergeInput | None, out: Path
) -> MergeReport:
    """Merge adapters of one base into a LoRA of it in the folder `out`.

    A merge that is linear in the changes is exact, its rank the sum of theirs, or with `config.rank` the
    best of that rank. Any other is made of whole changes, and needs a rank.

    Raises:
        ModelError: The models are not adapters of one base.
        ConfigError: A rank is needed, there is too little memory, or `out` holds another merge.
    """
    began = time.perf_counter()
    _check(config, inputs, base)
    digest = digest_of(config, inputs, base)
    if (done := finished_report(out, digest)) is not None:
        return done
    notes = compare_tokenizers(inputs)
    ground = MergeInput(BASE, inputs[0].checkpoint, inputs[0].config)
    jobs = plan_merge(inputs, ground, None, "refuse").jobs
    adapted = [job for job in jobs if any(model.adapts(job.name) for model in inputs)]
    # What becomes of the factors is as large as the factors are.
    factors_too = sum(
        4 * tensor.numel() for model in inputs if model.adapter for tensor in model.adapter.tensors.values()
    )
    room_for(adapted, merger, config.max_memory, 1, anonymous_bytes() + factors_too)
    factors = {
        name.removesuffix(WEIGHT): change
        for name, change in _all_factors(config, merger, inputs, jobs, adapted)
    }
    report = MergeReport(
        model_dir=out,
        merger=options_of(config),
        models={model.label: str(model.folder) for model in inputs},
        base=str(inputs[0].checkpoint.folder),
        result="adapter",
        tensors=tuple(_merged_layer(layer, change, inputs[0]) for layer, change in factors.items()),
        bytes_read=sum(
            (model.adapter_folder / WEIGHTS).stat().st_size for model in inputs if model.adapter_folder
        ),
        bytes_written=sum(4 * (change.a.numel() + change.b.numel()) for change in factors.values()),
        seconds=time.perf_counter() - began,
        notes=tuple(notes),
        discarded={layer: change.discarded for layer, change in factors.items()} if config.rank else {},
    )
    _write(out, factors, inputs, report, digest)
    return report


def _check(config: DictConfig, inputs: Sequence[MergeInput], base: MergeInput | None) -> None:
    folder = inputs[0].checkpoint.folder
    for model in inputs:
        if model.origin is not None:
            raise ModelError(
                f"{model.place}: its adapter is more than changes of single layers; result=adapter merges "
                "those alone; set result=model"
            )
        if model.adapter is None:
            raise ModelError(f"{model.place} is a whole model; result=adapter merges adapters")
        if model.checkpoint.folder != folder:
            raise ModelError(
                f"{model.place} is an adapter of {model.checkpoint.folder}, and {inputs[0].place} of "
                f"{folder}; only adapters of one base make one adapter: set result=model"
            )
    if base is not None and base.folder != folder:
        raise ConfigError(
            f"base={config.base} is not what the adapters lie on, which result=adapter keeps: leave it out, "
            "or set result=model"
        )


def _all_factors(
    config: DictConfig,
    merger: Merger,
    inputs: Sequence[MergeInput],
    jobs: Sequence[TensorJob],
    adapted: Sequence[TensorJob],
) -> Iterator[tuple[str, Factors]]:
    """Yield the merged change of every layer that an adapter changes."""
    coefficients = merger.coefficients([model.label for model in inputs])
    statistics = None
    for job in adapted:
        layers = [model.layer(job.name) if model.adapts(job.name) else None for model in inputs]
        parts = _parts(layers)
        if coefficients is not None and parts is not None:
            stacked = _stacked(parts, coefficients)
            yield job.name, stacked if config.rank is None else cut_factors(stacked, config.rank)
            continue
        if config.rank is None:
            why = "this merger's" if coefficients is None else "such adapters'"
            raise ConfigError(f"{why} merge is of no low rank: set rank=R, or result=model for an exact one")
        if merger.statistics_over == "model" and statistics is None:
            statistics = merger.collect_statistics(groups_of(jobs, merger, 0))
        yield job.name, cut_change(_change(job, merger, statistics), config.rank, job.name)


def _parts(layers: Sequence[AdaptedLinear | None]) -> list[tuple[torch.Tensor, torch.Tensor] | None] | None:
    """Return B and A of every layer, None for a model that leaves it alone; None if one is of no low rank."""
    parts = [None if layer is None else layer.low_rank() for layer in layers]
    whole = all(layer is None or part is not None for layer, part in zip(layers, parts, strict=True))
    return parts if whole else None


def _stacked(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor] | None], coefficients: Sequence[float]
) -> Factors:
    """Return [c₁B₁ c₂B₂ …] and [A₁; A₂; …]: their product is the sum of the changes."""
    there = [(c, part) for c, part in zip(coefficients, parts, strict=True) if part is not None]
    return Factors(torch.cat([c * b for c, (b, _) in there], 1), torch.cat([a for _, (_, a) in there]))


def cut_factors(whole: Factors, rank: int) -> Factors:
    """Return the best factors of at most `rank`, by QR of both and an SVD of the small product between."""
    q_b, r_b = torch.linalg.qr(whole.b.double())  # (d_out, k), (k, k)
    q_a, r_a = torch.linalg.qr(whole.a.double().T)  # (d_in, k), (k, k)
    u, s, v = torch.linalg.svd(r_b @ r_a.T)
    root = s[:rank].sqrt()
    total = float(s.square().sum())
    lost = float(s[rank:].square().sum()) / total if total else 0.0
    return Factors((q_b @ u[:, :rank] * root).float(), (root[:, None] * (v[:rank] @ q_a.T)).float(), lost)


def cut_change(change: torch.Tensor, rank: int, name: str) -> Factors:
    """Return factors of `rank` that are nearly the best of a whole change (d_out, d_in)."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wide = min(rank + OVERSAMPLED, *change.shape)
        u, s, v = torch.svd_lowrank(change, q=wide, niter=ITERATIONS)
    root = s[:rank].sqrt()
    flat = change.reshape(-1)
    runs = (flat[start : start + RUN] for start in range(0, len(flat), RUN))
    total = sum((float(torch.dot(part, part)) for part in runs), 0.0)
    kept = float(s[:rank].double().square().sum())
    return Factors(
        u[:, :rank] * root, root[:, None] * v[:, :rank].T, max(0.0, 1 - kept / total) if total else 0.0
    )


def _change(job: TensorJob, merger: Merger, statistics: Any) -> torch.Tensor:
    """Return what the merge adds to the base's weight, (d_out, d_in)."""
    reading = Reading(job, merger, job.count)
    if merger.statistics_over == "tensor":
        statistics = merger.collect_statistics(reading.groups)
    change = torch.empty(job.count)
    for group in reading.groups(statistics):
        assert group.base is not None
        merged = merger.merge(group)
        torch.sub(
            merged.view(-1), group.base.view(-1), out=change[group.start : group.start + merged.numel()]
        )
    whole = change.view(job.shape)
    return whole.T if any(model.transposes(job.name) for model in job.inputs) else whole


def _merged_layer(layer: str, factors: Factors, model: MergeInput) -> MergedTensor:
    """Return what the change of a layer is beside its weight."""
    weight = model.checkpoint.read(f"{layer}{WEIGHT}").float()
    # ‖B A‖² = tr(Bᵀ B · A Aᵀ)
    square = float(((factors.b.T @ factors.b) * (factors.a @ factors.a.T)).sum())
    before = float(weight.norm())
    return MergedTensor(layer, max(square, 0.0) ** 0.5 / before if before else 0.0, None, 0.0, None)


def _write(
    folder: Path,
    factors: dict[str, Factors],
    inputs: Sequence[MergeInput],
    report: MergeReport,
    digest: str,
) -> None:
    """Write a PEFT folder of one rank, whose scale is 1, and read it back."""
    adapter = inputs[0].adapter
    assert adapter is not None
    rank = max(len(change.a) for change in factors.values())
    tensors = {}
    for layer, change in factors.items():
        missing = rank - len(change.a)  # zeros, so that every program finds one rank
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = F.pad(change.a, (0, 0, 0, missing)).contiguous()
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = F.pad(change.b, (0, missing)).contiguous()
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0,
        "target_modules": sorted(factors), "fan_in_fan_out": any(model.conv1d for model in inputs),
        "bias": "none",
        "base_model_name_or_path": report.base, "inference_mode": True, "init_lora_weights": True,
        "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
        "revision": None,
    }  # fmt: skip
    with written_whole(folder) as fresh:
        (fresh / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(tensors, fresh / WEIGHTS, metadata={"format": "pt"})
        saved = read_adapter(fresh, adapter_readers(), set(factors))
        for name, tensor in tensors.items():
            if not torch.equal(saved.tensors[name.removeprefix(PREFIX)], tensor):
                raise ModelError(f"{folder}: {name} reads back differently")
        copy_tokenizer(inputs, fresh)
        write_report(fresh, inputs, report, digest)
