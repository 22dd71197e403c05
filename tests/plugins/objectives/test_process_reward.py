"""The process reward objective: steps and labels, its equation, precision and recall, bad rows."""

import math

import pytest
import torch

from helpers import tiny_llama, tiny_tokenizer
from luthier import Codec, ConfigError, DataError, ModelPolicy, Pack, Row, UnusableRowError
from luthier.models.score_head import attach_head
from luthier_plugins.objectives.process_reward import ProcessReward

ROWS = [
    {"prompt": "What is 2 + 3 + 4?", "steps": ["2 + 3 = 5", "5 + 4 = 10"], "labels": [True, False]},
    {"prompt": "one two", "steps": ["one"], "labels": ["+"]},
]
CODEC = Codec(tiny_tokenizer())


def tree(row, **options):
    return ProcessReward(**options).encode(Row(row, "row 1"), CODEC)


@pytest.fixture
def policy():
    model = tiny_llama()
    attach_head(model, "token", torch.Generator().manual_seed(0))
    return ModelPolicy(model)


def test_a_step_ends_with_its_separator_which_is_scored():
    found = tree(ROWS[0])
    ids = found.branches[0].ids
    first, second = (CODEC.continuation(step) for step in ROWS[0]["steps"])
    line = CODEC.continuation("\n")
    assert list(ids) == first + line + second + line
    assert found.branches[0].scored_places == [len(first + line) - 1, len(ids) - 1]
    assert found.values == {"1": 1.0, "2": 0.0}


def test_the_loss_is_the_cross_entropy_at_the_ends_of_steps(policy):
    objective = ProcessReward()
    found = [tree(row) for row in ROWS]
    loss = objective.loss(policy, Pack.of(found))
    expected, labels = 0.0, iter([1.0, 0.0, 1.0])
    for one in found:
        path = torch.tensor([one.prompt + one.branches[0].ids])
        with policy.native_attention():
            hidden = policy.model.get_decoder()(path).last_hidden_state[0]
        for place in one.branches[0].scored_places:
            p = 1 / (1 + math.exp(-policy.model.score_head(hidden[len(one.prompt) + place]).item()))
            expected -= math.log(p if next(labels) else 1 - p)
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    assert loss.weight == 3


def test_precision_and_recall_are_of_wrong_steps():
    objective = ProcessReward()
    scores, right = torch.tensor([2.0, -1.0, -1.0, 3.0]), torch.tensor([True, False, True, False])
    told = objective._metrics(scores, right)
    means = {name: float(total) / weight for name, (total, weight) in told.items()}
    found = objective.summarise(means)
    assert found["step_accuracy"] == 0.5
    assert found["wrong_steps/precision"] == 0.5
    assert found["wrong_steps/recall"] == 0.5
    assert found["f1"] == 0.5
    assert not any(name.startswith("raw/") for name in found)


@pytest.mark.parametrize(
    ("row", "error", "told"),
    [
        ({"labels": [True]}, DataError, "row 1: 2 steps and 1 labels; expected one a step"),
        ({"labels": [True, "maybe"]}, DataError, "row 1: label 2 must be true or false"),
        ({"labels": [True, 0.5]}, DataError, "row 1: label 2 must be true or false"),
        ({"labels": [True, None]}, DataError, "row 1: label 2 must be true or false"),
        ({"steps": ["2 + 3 = 5", " "]}, DataError, "row 1: step 2 must be a text with something in it"),
        ({"steps": ["2 + 3 = 5", 7]}, DataError, "row 1: step 2 must be a text with something in it"),
        ({"steps": "2 + 3 = 5"}, DataError, "expects 'prompt' and the lists 'steps' and 'labels'"),
        ({"steps": [], "labels": []}, UnusableRowError, "without a step"),
    ],
)
def test_a_bad_row_is_named(row, error, told):
    with pytest.raises(error, match=told):
        tree({**ROWS[0], **row})


def test_an_empty_separator_is_refused():
    with pytest.raises(ConfigError, match="separator is empty"):
        ProcessReward(separator="")
