"""Trees in flat numbers: what comes out is what went in, in memory and from the file behind it."""

import dataclasses
import random
import subprocess
import sys
import tempfile
import time

import pytest
import torch

from luthier import Branch, DataError, Tree
from luthier.trees.tree_store import TreeStore


def some_trees(count: int = 40, longest: int = 30) -> list[Tree]:
    chance = random.Random(1)

    def ids() -> tuple[int, ...]:
        return tuple(chance.randrange(2**31 - 1) for _ in range(chance.randint(1, longest)))

    def branch() -> Branch:
        tokens = ids()
        mask = chance.choice([None, tuple(chance.random() < 0.5 for _ in tokens), (True,) * len(tokens)])
        return Branch(tokens, mask)

    return [
        Tree(
            ids(),
            tuple(branch() for _ in range(chance.randint(0, 3))),
            chance.choice(["", "rows.jsonl:7", "ü/ス.csv:1", "\ud800"]),
            chance.choice([{}, {"label": 1.0}, {"margin": -0.5, "label": 0.0}]),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("spill", [1, 100, 2**20])
def test_trees_come_back_equal_wherever_they_are_kept(spill):
    trees = some_trees()
    store = TreeStore(trees, spill=spill)
    assert list(store) == trees
    assert [store[-1], store[3]] == [trees[-1], trees[3]]
    assert [tree.values for tree in store] == [tree.values for tree in trees]
    assert all(type(flag) is bool for tree in store for b in tree.branches for flag in b.scored or ())
    with pytest.raises(IndexError):
        store[len(trees)]


def test_every_field_of_a_tree_is_kept_or_refused():
    # A field that is added to them must be stored too, or refused as notes are.
    assert [field.name for field in dataclasses.fields(Tree)] == ["prompt", "branches", "origin", "values"]
    assert [field.name for field in dataclasses.fields(Branch)] == ["ids", "scored", "notes"]
    with pytest.raises(DataError, match=r"rows.jsonl:2: an example's tokens have no notes"):
        TreeStore([Tree((1,), (Branch((2,), notes={"logprob": (-1.0,)}),), "rows.jsonl:2")])


def test_a_selection_has_the_trees_and_the_counts_of_what_it_selects():
    trees = some_trees()
    store = TreeStore(trees, spill=50)
    part = store.select([5, 0, 9]).select([2, 0])
    assert list(part) == [trees[9], trees[5]]
    assert part.lengths().tolist() == [trees[9].tokens, trees[5].tokens]
    assert part.scored().tolist() == [trees[9].scored_tokens, trees[5].scored_tokens]
    assert part.digests().tolist() == [int(store.digests()[i]) for i in (9, 5)]
    assert list(store[1:3]) == trees[1:3]


@pytest.mark.slow
def test_digests_are_of_the_contents_and_the_same_in_every_process():
    tree = Tree((1, 2), (Branch((3,)), Branch((4, 5), (True, False))), "a:1", {"label": 1.0})
    other_places = dataclasses.replace(tree, origin="b:9")
    changed = [
        dataclasses.replace(tree, prompt=(1, 3)),
        dataclasses.replace(tree, branches=tree.branches[::-1]),
        dataclasses.replace(tree, branches=(Branch((3, 4)), Branch((5,), (True,)))),
        dataclasses.replace(tree, branches=(tree.branches[0], Branch((4, 5)))),
        dataclasses.replace(tree, values={"label": 0.0}),
        dataclasses.replace(tree, values={"margin": 1.0}),
    ]
    digests = TreeStore([tree, other_places, *changed]).digests()
    assert digests.dtype == torch.int64
    assert digests[0] == digests[1]
    assert len(set(digests.tolist())) == 1 + len(changed)
    code = "from luthier import *; from luthier.trees.tree_store import TreeStore; print(int(TreeStore(["
    code += (
        "Tree((1, 2), (Branch((3,)), Branch((4, 5), (True, False))), 'a:1', {'label': 1.0})]).digests()[0]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == int(digests[0])


def test_memory_is_four_bytes_a_token_and_none_beyond_the_threshold():
    tree = Tree(
        tuple(range(500)), (Branch(tuple(range(500)), (False,) * 250 + (True,) * 250),), "rows.jsonl:12"
    )
    store = TreeStore([tree] * 50)
    assert 4 * 1000 < store._data.recent.itemsize * len(store._data.recent) / 50 < 4 * 1030
    spilled = TreeStore([tree] * 50, spill=2000)
    assert len(spilled._data.recent) < 2000
    assert spilled[49] == spilled[0] == tree


def _seconds(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def test_a_full_disk_is_one_line(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(DataError, match=r"does not fit in /nowhere: No such file or directory; set TMPDIR"):
        TreeStore(some_trees(3), spill=1)
