"""What a merge will do, checked before anything is read: which tensors, by which rule."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from luthier.errors import ModelError
from luthier_plugins.commands.merge.io.base_model import empty_model
from luthier_plugins.commands.merge.io.inputs import MergeInput
from luthier_plugins.commands.merge.plan.skeleton import (
    check_names,
    may_tie,
    shared_names,
    tied_names,
    ties,
)
from luthier_plugins.commands.merge.run.tensor import RUN, TensorJob

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MISSING = ("refuse", "base", "present")
_SAME = ("model_type", "architectures", "hidden_size", "num_hidden_layers", "vocab_size")
_HARMLESS = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "pad_token_id"}
)


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do.

    Attributes:
        jobs: The tensors of the result, as the first model orders them.
        notes: What a person should know of them, a line each.
        skeleton: The model without weights, as transformers builds it from the result's config; None where
            it was not needed.
        untied: The result has an output head of its own, whatever the first model's config says.
    """

    jobs: tuple[TensorJob, ...]
    notes: tuple[str, ...]
    skeleton: PreTrainedModel | None
    untied: bool = False


@dataclass
class _Found:
    """What is found out tensor by tensor."""

    jobs: list[TensorJob] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    partly: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)
    widened: list[str] = field(default_factory=list)


def plan_merge(
    inputs: Sequence[MergeInput],
    base: MergeInput | None,
    dtype: torch.dtype | None,
    missing: str,
    load: bool = False,
) -> MergePlan:
    """Return what merging `inputs` will do.

    Where all models have the same tensors and none is another one under a second name, the result loads as
    they do, and transformers, whose import takes seconds, is not asked.

    Args:
        inputs: The models.
        base: Of a merger that needs one.
        dtype: What floating-point tensors are written in; None: the widest that a model has.
        missing: What becomes of tensors that some models lack: one of `MISSING`.
        load: Whether transformers is asked in any case.

    Raises:
        ModelError: The models do not fit each other; tensors, shapes and models are named.
    """
    everyone = [*inputs, base] if base is not None else list(inputs)
    first = base or inputs[0]
    notes = list(_check_configs(first, everyone))
    doubtful = load or any(model.tensors.keys() != first.tensors.keys() for model in everyone)
    skeleton = empty_model(first.checkpoint.folder) if doubtful or any(map(may_tie, everyone)) else None
    tied = tied_names(skeleton) if skeleton is not None else {}
    _check_ties(tied, inputs)
    shared = shared_names(skeleton) if skeleton is not None else {}
    if skeleton is not None:
        notes += _heads_in_use(shared, [model for model in everyone if ties(model, skeleton)], everyone)
    names: dict[str, None] = {}
    for model in (first, *everyone):
        names |= dict.fromkeys(model.tensors)
    findings = _Found()
    for name in names:
        if name in tied and all(
            name not in model.tensors or _is_copy(model, name, tied[name]) for model in everyone
        ):
            findings.tied.append(name)
            continue
        findings.jobs.append(_job(name, inputs, base, dtype, missing, findings))
    if skeleton is not None:
        check_names(first.place, {job.name: job.shape for job in findings.jobs}, skeleton)
    notes += _notes(findings, missing)
    untied = any(job.name in shared for job in findings.jobs)
    return MergePlan(tuple(findings.jobs), tuple(notes), skeleton, untied)


def _heads_in_use(
    shared: Mapping[str, str], tying: Sequence[MergeInput], models: Sequence[MergeInput]
) -> Iterator[str]:
    """Where some models have a head of their own, let those without take part with the one that they use.

    Yields:
        What a person should know of it.
    """
    for name, of in shared.items():
        lacking = [m for m in tying if name not in m.tensors and of in m.tensors]
        if lacking and any(name in m.tensors and not _is_copy(m, name, of) for m in models):
            for model in lacking:
                model.checkpoint.borrow(name, of)
            labels = ", ".join(model.label for model in lacking)
            yield f"{name} is {of} in {labels}, and merged as that; the result has one of its own"


def _job(
    name: str,
    inputs: Sequence[MergeInput],
    base: MergeInput | None,
    dtype: torch.dtype | None,
    missing: str,
    findings: _Found,
) -> TensorJob:
    holders = tuple(model for model in inputs if name in model.tensors)
    under = base if base is not None and name in base.tensors else None
    everyone = [*holders, under] if under is not None else list(holders)
    first = under or holders[0]
    stored = first.tensors[name]
    for model in everyone:
        if model.tensors[name].shape != stored.shape:
            raise ModelError(_other_shape(name, first, model))
    floats = stored.dtype.is_floating_point
    written = _written(name, everyone, dtype, findings) if floats else stored.dtype
    if len(holders) < len(inputs) or (base is not None and under is None):
        findings.partly.append(name)
        source = _partly(name, inputs, holders, base, missing)
        if source is None and not floats:
            _check_equal(name, everyone)
            source = first
        return TensorJob(name, stored.shape, written, holders, under, source)
    if not floats:
        _check_equal(name, everyone)
        findings.copied.append(name)
        return TensorJob(name, stored.shape, written, holders, base, first)
    # Adapters that leave a tensor of their base alone all have the same one.
    folders = {model.checkpoint.folder for model in everyone}
    alike = len(everyone) > 1 and len(folders) == 1 and not any(model.adapts(name) for model in everyone)
    return TensorJob(name, stored.shape, written, holders, base, first if alike else None, alike)


def _written(
    name: str, models: Sequence[MergeInput], chosen: torch.dtype | None, findings: _Found
) -> torch.dtype:
    """Return the dtype that a tensor is written in."""
    own = {model.tensors[name].dtype for model in models}
    if not all(dtype.is_floating_point for dtype in own):
        labels = ", ".join(f"{model.tensors[name].dtype} in {model.label}" for model in models)
        raise ModelError(f"{name} counts in whole numbers in some models only: {labels}")
    if len(own) > 1 and chosen is None:
        findings.widened.append(name)
    return chosen or functools.reduce(torch.promote_types, sorted(own, key=str))


def _check_ties(tied: Mapping[str, str], models: Sequence[MergeInput]) -> None:
    """Refuse an adapter on a tensor that is another one under a second name."""
    for model in models:
        for name, of in tied.items():
            if model.adapts(name) or model.adapts(of):
                raise ModelError(
                    f"{model.place}: its adapter changes one of {name} and {of}, which are one tensor in "
                    "this model; train the adapter without it, or untie the base (tie_word_embeddings)"
                )


def _partly(
    name: str,
    inputs: Sequence[MergeInput],
    holders: Sequence[MergeInput],
    base: MergeInput | None,
    missing: str,
) -> MergeInput | None:
    """Return the model that a tensor which not all have is copied from; None: it is merged."""
    in_base = base is not None and name in base.tensors
    if missing == "refuse":
        lacking = [model.place for model in inputs if name not in model.tensors]
        lacking += ["base"] if base is not None and not in_base else []
        raise ModelError(
            f"{name} is not in {', '.join(lacking)}; missing=present merges the models that have a tensor, "
            "missing=base takes the base's"
        )
    if base is None:
        return None
    if in_base and (missing == "base" or not holders):
        return base
    if in_base:
        return None
    return holders[0] if len(holders) == 1 else _no_base(name, holders)


def _no_base(name: str, holders: Sequence[MergeInput]) -> MergeInput:
    labels = ", ".join(model.label for model in holders)
    raise ModelError(
        f"{name} is in {labels} and not in the base, so there is nothing to take differences to; merge "
        "without it, or choose another base"
    )


def _other_shape(name: str, first: MergeInput, other: MergeInput) -> str:
    shapes = " and ".join(f"{list(model.tensors[name].shape)} in {model.label}" for model in (first, other))
    rows = [model.config.get("vocab_size") for model in (first, other)]
    vocabulary = f": vocabularies of {rows[0]} and {rows[1]} tokens" if rows[0] != rows[1] else ""
    return f"{name} is {shapes}{vocabulary}; only models of one shape can be merged"


def _check_equal(name: str, models: Sequence[MergeInput]) -> None:
    own = models[0].checkpoint.read(name)
    for model in models[1:]:
        if not torch.equal(own, model.checkpoint.read(name)):
            raise ModelError(
                f"{name} counts in whole numbers and differs between {models[0].label} and {model.label}; "
                "such tensors are not merged"
            )


def _check_configs(first: MergeInput, models: Sequence[MergeInput]) -> list[str]:
    """Refuse other architectures; return notes of what else differs."""
    notes = []
    for model in models:
        for key in _SAME[:2]:
            if model.config.get(key) != first.config.get(key):
                raise ModelError(
                    f"{model.label} is a {model.config.get(key)} and {first.label} a "
                    f"{first.config.get(key)}; only models of one architecture can be merged"
                )
        keys = {*model.config, *first.config} - _HARMLESS
        differing = sorted(key for key in keys if model.config.get(key) != first.config.get(key))
        if differing and not set(differing) & set(_SAME):
            notes.append(
                f"{model.label}: its config has another {', '.join(differing)}; {first.label}'s is written"
            )
    return notes


def _is_copy(model: MergeInput, name: str, of: str) -> bool:
    """Whether the tensor `name` equals the tensor `of`, run by run."""
    tensor, other = model.tensors.get(name), model.tensors.get(of)
    if tensor is None or other is None or tensor.shape != other.shape or tensor.dtype != other.dtype:
        return False
    spans = ((start, min(start + RUN, tensor.count)) for start in range(0, tensor.count, RUN))
    return all(
        torch.equal(model.checkpoint.read(name, *span), model.checkpoint.read(of, *span)) for span in spans
    )


def _notes(findings: _Found, missing: str) -> list[str]:
    notes = []
    if findings.widened:
        notes.append(
            f"{len(findings.widened)} tensors are stored in several dtypes, and written in the widest: "
            f"{_shortened(findings.widened)}"
        )
    if findings.tied:
        notes.append(f"tied, written once: {', '.join(findings.tied)}")
    if findings.copied:
        notes.append(f"{len(findings.copied)} tensors of whole numbers copied: {_shortened(findings.copied)}")
    if findings.partly:
        notes.append(
            f"{len(findings.partly)} tensors that not all models have, missing={missing}: "
            f"{_shortened(findings.partly)}"
        )
    return notes


def _shortened(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (" …" if len(names) > count else "")
