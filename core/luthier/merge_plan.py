"""What a merge will do, checked before anything is read: which tensors, by which rule."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from luthier.errors import ModelError
from luthier.merge_inputs import MergeInput
from luthier.merge_skeleton import check_names, empty_model, may_tie, tied_names
from luthier.merge_tensor import RUN, TensorJob

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
    """

    jobs: tuple[TensorJob, ...]
    notes: tuple[str, ...]
    skeleton: PreTrainedModel | None


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
    doubtful = load or any(one.tensors.keys() != first.tensors.keys() for one in everyone)
    skeleton = empty_model(first) if doubtful or any(map(may_tie, everyone)) else None
    tied = tied_names(skeleton) if skeleton is not None else {}
    _check_ties(tied, inputs)
    names: dict[str, None] = {}
    for one in (first, *everyone):
        names |= dict.fromkeys(one.tensors)
    found = _Found()
    for name in names:
        if name in tied and all(
            name not in one.tensors or _is_copy(one, name, tied[name]) for one in everyone
        ):
            found.tied.append(name)
            continue
        found.jobs.append(_job(name, inputs, base, dtype, missing, found))
    if skeleton is not None:
        check_names(first.place, {job.name: job.shape for job in found.jobs}, skeleton)
    notes += _notes(found, missing)
    return MergePlan(tuple(found.jobs), tuple(notes), skeleton)


def _job(
    name: str,
    inputs: Sequence[MergeInput],
    base: MergeInput | None,
    dtype: torch.dtype | None,
    missing: str,
    found: _Found,
) -> TensorJob:
    holders = tuple(one for one in inputs if name in one.tensors)
    under = base if base is not None and name in base.tensors else None
    everyone = [*holders, under] if under is not None else list(holders)
    first = under or holders[0]
    stored = first.tensors[name]
    for one in everyone:
        if one.tensors[name].shape != stored.shape:
            raise ModelError(_other_shape(name, first, one))
    floats = stored.dtype.is_floating_point
    written = _written(name, everyone, dtype, found) if floats else stored.dtype
    if len(holders) < len(inputs) or (base is not None and under is None):
        found.partly.append(name)
        source = _partly(name, inputs, holders, base, missing)
        if source is None and not floats:
            _check_equal(name, everyone)
            source = first
        return TensorJob(name, stored.shape, written, holders, under, source)
    if not floats:
        _check_equal(name, everyone)
        found.copied.append(name)
        return TensorJob(name, stored.shape, written, holders, base, first)
    # Adapters that leave a tensor of their base alone all have the same one.
    folders = {one.checkpoint.folder for one in everyone}
    alike = len(everyone) > 1 and len(folders) == 1 and not any(one.adapts(name) for one in everyone)
    return TensorJob(name, stored.shape, written, holders, base, first if alike else None, alike)


def _written(
    name: str, models: Sequence[MergeInput], chosen: torch.dtype | None, found: _Found
) -> torch.dtype:
    """Return the dtype that a tensor is written in."""
    own = {one.tensors[name].dtype for one in models}
    if not all(dtype.is_floating_point for dtype in own):
        labels = ", ".join(f"{one.tensors[name].dtype} in {one.label}" for one in models)
        raise ModelError(f"{name} counts in whole numbers in some models only: {labels}")
    if len(own) > 1 and chosen is None:
        found.widened.append(name)
    return chosen or functools.reduce(torch.promote_types, sorted(own, key=str))


def _check_ties(tied: Mapping[str, str], models: Sequence[MergeInput]) -> None:
    """Refuse an adapter on a tensor that is another one under a second name."""
    for one in models:
        for name, of in tied.items():
            if one.adapts(name) or one.adapts(of):
                raise ModelError(
                    f"{one.place}: its adapter changes one of {name} and {of}, which are one tensor in this "
                    "model; train the adapter without it, or untie the base (tie_word_embeddings)"
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
        lacking = [one.place for one in inputs if name not in one.tensors]
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
    labels = ", ".join(one.label for one in holders)
    raise ModelError(
        f"{name} is in {labels} and not in the base, so there is nothing to take differences to; merge "
        "without it, or choose another base"
    )


def _other_shape(name: str, first: MergeInput, other: MergeInput) -> str:
    shapes = " and ".join(f"{list(one.tensors[name].shape)} in {one.label}" for one in (first, other))
    rows = [one.config.get("vocab_size") for one in (first, other)]
    vocabulary = f": vocabularies of {rows[0]} and {rows[1]} tokens" if rows[0] != rows[1] else ""
    return f"{name} is {shapes}{vocabulary}; only models of one shape can be merged"


def _check_equal(name: str, models: Sequence[MergeInput]) -> None:
    own = models[0].checkpoint.read(name)
    for one in models[1:]:
        if not torch.equal(own, one.checkpoint.read(name)):
            raise ModelError(
                f"{name} counts in whole numbers and differs between {models[0].label} and {one.label}; such "
                "tensors are not merged"
            )


def _check_configs(first: MergeInput, models: Sequence[MergeInput]) -> list[str]:
    """Refuse other architectures; return notes of what else differs."""
    notes = []
    for one in models:
        for key in _SAME[:2]:
            if one.config.get(key) != first.config.get(key):
                raise ModelError(
                    f"{one.label} is a {one.config.get(key)} and {first.label} a {first.config.get(key)}; "
                    "only models of one architecture can be merged"
                )
        keys = {*one.config, *first.config} - _HARMLESS
        differing = sorted(key for key in keys if one.config.get(key) != first.config.get(key))
        if differing and not set(differing) & set(_SAME):
            notes.append(
                f"{one.label}: its config has another {', '.join(differing)}; {first.label}'s is written"
            )
    return notes


def _is_copy(model: MergeInput, name: str, of: str) -> bool:
    """Whether the tensor `name` equals the tensor `of`, run by run."""
    one, other = model.tensors.get(name), model.tensors.get(of)
    if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    spans = ((start, min(start + RUN, one.count)) for start in range(0, one.count, RUN))
    return all(
        torch.equal(model.checkpoint.read(name, *span), model.checkpoint.read(of, *span)) for span in spans
    )


def _notes(found: _Found, missing: str) -> list[str]:
    notes = []
    if found.widened:
        notes.append(
            f"{len(found.widened)} tensors are stored in several dtypes, and written in the widest: "
            f"{_some(found.widened)}"
        )
    if found.tied:
        notes.append(f"tied, written once: {', '.join(found.tied)}")
    if found.copied:
        notes.append(f"{len(found.copied)} tensors of whole numbers copied: {_some(found.copied)}")
    if found.partly:
        notes.append(
            f"{len(found.partly)} tensors that not all models have, missing={missing}: {_some(found.partly)}"
        )
    return notes


def _some(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (" …" if len(names) > count else "")
