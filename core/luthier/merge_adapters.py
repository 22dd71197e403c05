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
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file

from luthier.errors import ConfigError, ModelError
from luthier.folder import written_whole
from luthier.linear_adapter import AdaptedLinear
from luthier.merge_card import REPORT, copy_tokenizer, hashes_of, write_card
from luthier.merge_inputs import WEIGHT, MergeInput
from luthier.merge_report import MergeReport
from luthier.merge_tensor import MergedTensor
from luthier.merger import Group, Merger
from luthier.peft_folder import CONFIG, PREFIX, WEIGHTS, read_adapter, readers
from luthier.report import as_json, versions, write_json

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
    config: DictConfig, merger: Merger, inputs: list[MergeInput], base: MergeInput | None, run_dir: Path
) -> MergeReport:
    """Merge adapters of one base into a LoRA of it in ``run_dir/model``.

    A merge that is linear in the changes is exact, its rank the sum of theirs, or with `config.rank` the
    best of that rank. Any other is made of whole changes, and needs a rank.

    Raises:
        ModelError: The models are not adapters of one base.
        ConfigError: A rank is needed.
    """
    began = time.perf_counter()
    _check(config, inputs)
    names = list(dict.fromkeys(f"{layer}{WEIGHT}" for one in inputs for layer in sorted(one.layers)))
    factors = {}
    for name, found in _all_factors(config, merger, inputs, names):
        factors[name.removesuffix(WEIGHT)] = found
    report = MergeReport(
        model_dir=run_dir / "model",
        merger=_plain(config.merger),
        models={one.label: str(one.folder) for one in inputs},
        base=str(inputs[0].checkpoint.folder),
        result="adapter",
        tensors=tuple(_told(layer, one, inputs[0]) for layer, one in factors.items()),
        bytes_read=sum((one.adapter_folder / WEIGHTS).stat().st_size for one in inputs if one.adapter_folder),
        bytes_written=sum(4 * (one.a.numel() + one.b.numel()) for one in factors.values()),
        seconds=time.perf_counter() - began,
        discarded={layer: one.discarded for layer, one in factors.items()} if config.rank else {},
    )
    _write(run_dir / "model", factors, inputs, report)
    return report


def _check(config: DictConfig, inputs: Sequence[MergeInput]) -> None:
    for one in inputs:
        if one.adapter is None:
            raise ModelError(f"models.{one.label} is a whole model; result=adapter merges adapters")
        if one.checkpoint.folder != inputs[0].checkpoint.folder:
            mine, others = one.checkpoint.folder, inputs[0].checkpoint.folder
            raise ModelError(
                f"models.{one.label} is an adapter of {mine}, and models.{inputs[0].label} of {others}; only "
                "adapters of one base make one adapter: set result=model"
            )


def _all_factors(
    config: DictConfig, merger: Merger, inputs: Sequence[MergeInput], names: Sequence[str]
) -> Iterator[tuple[str, Factors]]:
    """Yield the merged change of every layer."""
    coefficients = merger.coefficients([one.label for one in inputs])
    surveyed = None
    for name in names:
        layers = [one.layer(name) if one.adapts(name) else None for one in inputs]
        parts = _parts(layers)
        if coefficients is not None and parts is not None:
            stacked = _stacked(parts, coefficients)
            yield name, stacked if config.rank is None else cut_factors(stacked, config.rank)
            continue
        if config.rank is None:
            why = "this merger's" if coefficients is None else "such adapters'"
            raise ConfigError(f"{why} merge is of no low rank: set rank=R, or result=model for an exact one")
        if merger.surveys == "model" and surveyed is None:
            surveyed = merger.survey(lambda: (_group(one, inputs) for one in sorted(names)))
        yield name, cut_change(_change(name, merger, inputs, surveyed), config.rank, name)


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
    total = float(change.double().square().sum())
    kept = float(s[:rank].double().square().sum())
    return Factors(
        u[:, :rank] * root, root[:, None] * v[:, :rank].T, max(0.0, 1 - kept / total) if total else 0.0
    )


def _group(name: str, inputs: Sequence[MergeInput], surveyed: Any = None) -> Group:
    """Return the whole weights of a layer, (d_out, d_in)."""
    layers = [one.layer(name) if one.adapts(name) else None for one in inputs]
    base = next(layer.base_weight().clone() for layer in layers if layer is not None)
    tensors = tuple(base if layer is None else layer.merged_weight() for layer in layers)
    return Group(name, tuple(one.label for one in inputs), tensors, base, 0, surveyed)


def _change(name: str, merger: Merger, inputs: Sequence[MergeInput], surveyed: Any) -> torch.Tensor:
    group = _group(name, inputs, surveyed)
    if merger.surveys == "tensor":
        group = Group(group.name, group.labels, group.tensors, group.base, 0, merger.survey(lambda: [group]))
    assert group.base is not None
    return merger.merge(group) - group.base


def _told(layer: str, factors: Factors, model: MergeInput) -> MergedTensor:
    """Return what the change of a layer is beside its weight."""
    weight = model.checkpoint.read(f"{layer}{WEIGHT}").float()
    # ‖B A‖² = tr(Bᵀ B · A Aᵀ)
    square = float(((factors.b.T @ factors.b) * (factors.a @ factors.a.T)).sum())
    return MergedTensor(layer, max(square, 0.0) ** 0.5 / float(weight.norm()), None, 0.0, None)


def _write(
    folder: Path, factors: dict[str, Factors], inputs: Sequence[MergeInput], report: MergeReport
) -> None:
    """Write a PEFT folder of one rank, whose scale is 1, and read it back."""
    adapter = inputs[0].adapter
    assert adapter is not None
    rank = max(len(one.a) for one in factors.values())
    tensors = {}
    for layer, one in factors.items():
        missing = rank - len(one.a)  # zeros, so that every program finds one rank
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = F.pad(one.a, (0, 0, 0, missing)).contiguous()
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = F.pad(one.b, (0, missing)).contiguous()
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0,
        "target_modules": sorted(factors), "fan_in_fan_out": adapter.transposed, "bias": "none",
        "base_model_name_or_path": report.base, "inference_mode": True, "init_lora_weights": True,
        "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
        "revision": None,
    }  # fmt: skip
    with written_whole(folder) as fresh:
        (fresh / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(tensors, fresh / WEIGHTS, metadata={"format": "pt"})
        saved = read_adapter(fresh, readers(), set(factors))
        for name, tensor in tensors.items():
            if not torch.equal(saved.tensors[name.removeprefix(PREFIX)], tensor):
                raise ModelError(f"{folder}: {name} reads back differently")
        copy_tokenizer(inputs[0], fresh)
        hashes = hashes_of(inputs)
        write_json(fresh / REPORT, {**as_json(report), "hashes": hashes, "versions": versions()})
        write_card(fresh, report, hashes)


def _plain(node: DictConfig) -> dict[str, Any]:
    options: Any = OmegaConf.to_container(node)
    return dict(options)
