"""Examples that are too long: dropped, cut on one side or refused, by numbers worked out by hand."""

import pytest

from luthier import Branch, DataError, Tree
from luthier.trees.truncation import fit

TREE = Tree((9, 1, 2, 3), (Branch((4, 5, 6), (False, True, True)), Branch((7,))), "f:1")


@pytest.mark.parametrize("overflow", ["drop", "truncate_left", "truncate_right", "refuse"])
def test_what_fits_is_left_alone(overflow):
    assert fit(TREE, 7, overflow) == (TREE, "")


@pytest.mark.parametrize(
    ("overflow", "length", "prompt", "branches", "told"),
    [
        ("truncate_left", 5, (2, 3), [(4, 5, 6), (7,)], "cut on the left to 5 tokens"),
        ("truncate_left", 4, (3,), [(4, 5, 6), (7,)], "cut on the left to 4 tokens"),
        ("truncate_right", 5, (9, 1, 2, 3), [(4,), (7,)], "cut on the right to 5 tokens"),
    ],
)
def test_what_is_too_long_is_cut_on_the_side_that_was_asked_for(overflow, length, prompt, branches, told):
    tree, reason = fit(TREE, length, overflow)
    assert (tree.prompt, [branch.ids for branch in tree.branches], reason) == (prompt, branches, told)
    assert tree.branches[0].scored == (False, True, True)[: len(branches[0])]


def test_a_cut_on_the_left_keeps_the_token_that_starts_a_text():
    assert fit(TREE, 5, "truncate_left", bos=9)[0].prompt == (9, 3)
    assert fit(TREE, 4, "truncate_left", bos=9)[0].prompt == (9,)


@pytest.mark.parametrize(
    ("overflow", "length", "told"),
    [
        ("drop", 6, "longer than 6 tokens"),
        ("truncate_left", 3, "longer than 3 tokens without the prompt"),
        ("truncate_right", 4, "longer than 4 tokens in the prompt alone"),
    ],
)
def test_what_no_cut_makes_fit_is_left_out_with_the_reason(overflow, length, told):
    assert fit(TREE, length, overflow) == (None, told)
    assert fit(TREE, length, overflow, bos=9) == (None, told)


def test_a_refusal_names_the_row_and_the_ways_out():
    with pytest.raises(DataError, match=r"f:1: 7 tokens are more than max_length=6; raise max_length, or "):
        fit(TREE, 6, "refuse")
