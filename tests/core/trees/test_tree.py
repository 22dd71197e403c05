"""Trees, packs and cuts."""

import random

import pytest
import torch

from luthier import Branch, DataError, Pack, Tree
from luthier.trees.layout import Segment
from luthier.trees.tree import cut

TWO = [
    Tree((1, 2, 3), (Branch((4, 5)), Branch((6, 7, 8), (True, False, True)))),
    Tree((9,), (Branch((10,)),)),
]


def test_a_pack_is_laid_out_as_documented():
    pack = Pack.of(TWO)
    assert pack.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
    assert pack.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1]]
    # 4 and 6 are predicted from the prompt's last token, 5 from 4, 8 from 7, 10 from 9.
    assert pack.positions.tolist() == [2, 3, 2, 6, 8]
    assert pack.targets.tolist() == [4, 5, 6, 8, 10]
    assert pack.offsets == (0, 2, 4, 5)
    assert pack.tree_of == (0, 0, 1)
    assert pack.spans.segments == (Segment(0, 5), Segment(5, 8, 0, 3), Segment(8, 10))
    assert (pack.tokens, pack.scored_tokens) == (10, 5)


def test_the_table_says_for_every_token_what_it_belongs_to():
    segment, parent, prompt, place = Pack.of(TWO).spans.table(torch.device("cpu")).tolist()
    assert segment == [0] * 5 + [5] * 3 + [8] * 2
    assert parent == [-1] * 5 + [0] * 3 + [-1] * 2
    assert prompt == [0] * 5 + [3] * 3 + [0] * 2
    assert place == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1]


def test_a_tree_counts_its_tokens():
    assert (TWO[0].tokens, TWO[0].scored_tokens) == (8, 4)
    assert (Tree((1, 2)).tokens, Tree((1, 2)).scored_tokens) == (2, 0)


def test_trees_without_children_have_nothing_scored():
    pack = Pack.of([Tree((1, 2))])
    assert pack.offsets == (0,)
    assert pack.positions.shape == (0,)
    assert pack.positions.dtype == torch.int64


@pytest.mark.parametrize(
    ("prompt", "branches", "message"),
    [
        ((), (Branch((1,)),), "^a.jsonl:3: the prompt has no tokens"),
        ((1,), (Branch((1,)), Branch(())), "^a.jsonl:3: completion 2 has no tokens"),
        ((1,), (Branch((1, 2), (True,)),), "completion 1 has 1 entries for 2 tokens"),
    ],
)
def test_what_no_pack_can_hold_is_refused_with_its_origin(prompt, branches, message):
    with pytest.raises(DataError, match=message) as caught:
        Tree(prompt, branches, origin="a.jsonl:3")
    assert "\n" not in str(caught.value)


def test_an_empty_pack_is_refused():
    with pytest.raises(DataError, match="at least one tree"):
        Pack.of([])


@pytest.mark.parametrize("seed", range(8))
def test_a_cut_is_a_partition_within_the_budget_and_balanced(seed):
    r = random.Random(seed)
    trees = [
        Tree((1,) * r.randint(1, 300), (Branch((2,) * r.randint(1, 100)),)) for _ in range(r.randint(1, 60))
    ]
    budget = r.choice([150, 420, 1000, 10**6])
    packs = cut(trees, budget)
    assert sorted(index for pack in packs for index in pack) == list(range(len(trees)))
    sizes = [sum(trees[index].tokens for index in pack) for pack in packs]
    assert all(size <= budget or len(pack) == 1 for size, pack in zip(sizes, packs, strict=True))
    shared = [size for size in sizes if size <= budget]
    # Never two packs that would fit into one, and never far above the fewest possible.
    assert all(a + b > budget for i, a in enumerate(shared) for b in shared[i + 1 :])
    assert len(shared) <= 1.25 * -(-sum(shared) // budget) + 1
    assert packs == cut(trees, budget)


def test_packs_of_a_cut_are_about_equal():
    trees = [Tree((1,) * size) for size in range(10, 90)]
    sizes = [sum(trees[index].tokens for index in pack) for pack in cut(trees, 1000)]
    assert len(sizes) == 4
    assert max(sizes) - min(sizes) <= 10


def test_a_tree_above_the_budget_is_alone():
    trees = [Tree((1,) * size) for size in (5, 50, 4)]
    assert cut(trees, 10) == [[0, 2], [1]]


def test_nothing_is_cut_into_nothing():
    assert cut([], 10) == []


def test_notes_are_split_over_the_branches_beside_those_they_have():
    # Scored: 4 5 | 6 8 | 10.
    first = Pack.of(TWO).noted({"value": torch.tensor([0.5, 1.5, 2.5, 3.5, 4.5])})
    again = Pack.of(first).noted(
        {"reward": torch.arange(5), "value": torch.tensor([9.0, 1.5, 2.5, 3.5, 4.5])}
    )
    assert [dict(branch.notes) for tree in again for branch in tree.branches] == [
        {"value": (9.0, 1.5), "reward": (0.0, 1.0)},
        {"value": (2.5, 3.5), "reward": (2.0, 3.0)},
        {"value": (4.5,), "reward": (4.0,)},
    ]
    assert Pack.of(again).notes("reward").tolist() == [0, 1, 2, 3, 4]
    kept = [dict(branch.notes)["value"] for tree in first for branch in tree.branches]
    assert kept == [(0.5, 1.5), (2.5, 3.5), (4.5,)], "the trees before stay as they were"
    only_new = Pack.of(first).noted({"reward": torch.arange(5)})
    assert only_new[0].branches[0].notes == {"value": (0.5, 1.5), "reward": (0.0, 1.0)}
