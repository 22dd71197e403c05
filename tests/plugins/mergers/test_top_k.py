"""Selection of the largest magnitudes: exact, whatever the groups and however little is held at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from luthier.contracts.merger import Group
from luthier_plugins.mergers.ties import top_k as selection


def kept_by_sorting(values: np.ndarray, share: float) -> np.ndarray:
    """Zero all but the largest, the first of equals first: by a stable sort of everything."""
    k = max(1, int(share * len(values)))
    order = np.argsort(-np.abs(values), kind="stable")[:k]
    kept = np.zeros_like(values)
    kept[order] = values[order]
    return kept


def kept_by_selection(models: list[np.ndarray], share: float, run: int) -> list[np.ndarray]:
    base = torch.zeros(run)

    def groups():
        for start in range(0, len(models[0]), run):
            parts = tuple(torch.from_numpy(one[start : start + run]) for one in models)
            yield Group("w", ("a", "b")[: len(models)], parts, base[: len(parts[0])], start)

    found = selection.largest(groups, share)
    results = [one.copy() for one in models]
    for result, which in zip(results, found.values(), strict=True):
        for start in range(0, len(result), run):
            which.keep_(torch.from_numpy(result[start : start + run]), ("w", start))
    return results


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 700),
    distinct=st.sampled_from([1, 2, 5, 100, 10**6]),
    zeros=st.sampled_from([0.0, 0.5, 1.0]),
    share=st.floats(0.001, 1.0),
    run=st.sampled_from([7, 64, 4000]),
    room=st.sampled_from([4, 50, 5000]),
)
def test_what_stays_is_what_a_stable_sort_keeps(seed, count, distinct, zeros, share, run, room):
    random = np.random.default_rng(seed)
    models = []
    for _ in range(2):
        values = random.integers(-distinct, distinct + 1, count).astype(np.float32) / distinct
        values[random.random(count) < zeros] = 0.0
        models.append(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "ROOM", room)
        found = kept_by_selection(models, share, run)
    for values, kept in zip(models, found, strict=True):
        assert np.array_equal(kept, kept_by_sorting(values, share))


def test_no_more_is_held_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(selection, "ROOM", 1000)
    held = []
    narrow = selection._Search.narrow

    def watch(self, k, total):
        held.append(sum(len(size) for _, size in self.held))
        narrow(self, k, total)

    monkeypatch.setattr(selection._Search, "narrow", watch)
    values = np.random.default_rng(0).standard_normal(200_000, dtype=np.float32)
    found = kept_by_selection([values], 0.2, 4096)[0]
    assert np.count_nonzero(found) == 40_000
    assert len(held) > 1
    assert max(held) < 2000
