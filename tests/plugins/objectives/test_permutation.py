"""Derangements by group: everybody meets somebody else's, and everybody once."""

from collections import Counter

import pytest
import torch
from hypothesis import given, strategies as st

from luthier import DataError
from luthier_plugins.objectives.kto.permutation import derangement


@given(
    st.lists(st.integers(0, 6), min_size=2, max_size=40).filter(lambda g: len(set(g)) > 1), st.integers(0, 99)
)
def test_nobody_stays_in_their_group(groups, seed):
    found = derangement(groups, torch.Generator().manual_seed(seed))
    assert all(groups[other] != groups[place] for place, other in enumerate(found))
    if 2 * max(Counter(groups).values()) <= len(groups):
        assert sorted(found) == list(range(len(groups)))


def test_the_seed_decides():
    groups = list(range(30))
    draws = [derangement(groups, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_one_group_is_refused():
    with pytest.raises(DataError, match="all 3 rows have one prompt"):
        derangement([5, 5, 5], torch.Generator())


def test_a_prompt_of_most_rows_meets_all_others_in_turn():
    groups = [0] * 90 + [1] * 6 + [2] * 4
    found = derangement(groups, torch.Generator().manual_seed(0))
    used = Counter(found[:90])
    assert used.keys() == set(range(90, 100))
    assert set(used.values()) == {9}
