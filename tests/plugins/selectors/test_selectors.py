"""Selectors: best-of-N against every subset, votes by hand."""

import itertools
import math

import pytest
import torch

from luthier import Candidate, ConfigError
from luthier_plugins.selectors.best_of_n import BestOfN
from luthier_plugins.selectors.majority import Majority


def told(*texts, cut=()):
    return [Candidate("?", text, finished=place not in cut) for place, text in enumerate(texts)]


@pytest.mark.parametrize("scores", [(0.3, -1.0, 2.5, 0.1, 0.7), (1.0, 0.0, 1.0, 0.0, 1.0), (2.0,) * 5])
@pytest.mark.parametrize("drawn", [1, 2, 3, 5])
def test_best_of_n_expects_the_mean_over_all_subsets(scores, drawn):
    candidates, values = told("a", "b", "c", "d", "e"), torch.tensor([5.0, 1.0, -2.0, 8.0, 0.5])
    method, known = BestOfN(), torch.tensor(scores)
    subsets = [list(one) for one in itertools.combinations(range(5), drawn)]
    chosen = [one[method.choose([candidates[i] for i in one], known[one])] for one in subsets]
    expected = sum(float(values[place]) for place in chosen) / len(subsets)
    assert method.expected(candidates, known, values, drawn) == pytest.approx(expected, abs=1e-6)


def test_the_divergence_of_best_of_n():
    assert BestOfN().divergence(1) == 0.0
    assert BestOfN().divergence(8) == pytest.approx(math.log(8) - 7 / 8)
    assert Majority().divergence(8) is None


@pytest.mark.parametrize(
    ("options", "texts", "cut", "scores", "chosen"),
    [
        ({}, ("a", "b", "b", "a", "b"), (), (0, 0, 0, 0, 0), 1),
        ({}, ("a", "b", "b", "a", "b"), (), (9, 0, 1, 0, 0), 2),
        ({}, ("a", "a", "b"), (0, 1), (0, 0, -5), 2),
        ({}, ("", " ", "b"), (), (0, 0, -5), 2),
        ({}, ("<think>x</think>a", "b", "<think>y</think>\n\na"), (), (0, 0, 1), 2),
        ({}, ("a", "b"), (0, 1), (0, 1), 1),
        ({"weigh": "score"}, ("a", "a", "b"), (), (0.2, 0.2, 0.5), 2),
        ({"answer": "number"}, ("It is 1,200.", "6", "1200.0 it is"), (), (0, 9, 1), 2),
        ({"answer": "number"}, ("x = 3 so 12345678", "12345679", "12345679"), (), (9, 0, 0), 1),
        ({"answer": "pattern", "pattern": r"\((.)\)"}, ("(a) or (b)", "(b)", "(a)"), (), (0, 1, 9), 1),
    ],
)
def test_the_majority_by_hand(options, texts, cut, scores, chosen):
    assert Majority(**options).choose(told(*texts, cut=cut), torch.tensor(scores).float()) == chosen


def test_a_vote_that_is_not_weighed_needs_no_scores():
    assert not Majority().needs_scores
    assert Majority(weigh="score").needs_scores
    assert BestOfN().needs_scores


@pytest.mark.parametrize(
    "options", [{"answer": "pattern"}, {"pattern": "a"}, {"answer": "pattern", "pattern": "("}]
)
def test_patterns_that_mean_nothing_are_refused(options):
    with pytest.raises(ConfigError, match="pattern"):
        Majority(**options)
