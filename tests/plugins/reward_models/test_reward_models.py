"""The reward models: verifier, penalties, callables, outcome and process scores, and their aggregation."""

import importlib.metadata
import math

import pytest
import torch

from helpers import save_tiny, write_rows
from luthier import Candidate, ConfigError, DataError, Place, Row, compose, train
from luthier_plugins.data_sources.jsonl import JsonLines
from luthier_plugins.reward_models.function import GROUP, Function
from luthier_plugins.reward_models.length import Length
from luthier_plugins.reward_models.missing_end import MissingEnd
from luthier_plugins.reward_models.outcome import Outcome
from luthier_plugins.reward_models.process import Process
from luthier_plugins.reward_models.verifier import Verifier

ROW = Row({"prompt": "2 + 2 =", "answer": "4"}, "rows.jsonl:3")


def candidate(text, row=ROW, **more):
    return Candidate("2 + 2 =", text, row=row, **more)


class Failing(JsonLines):
    def verify(self, row, answer):
        raise RuntimeError("no such task")


@pytest.mark.parametrize(
    ("options", "right", "wrong"),
    [
        ({}, " 4 ", "It is 4"),
        ({"match": "exact"}, "4\n", "4."),
        ({"match": "exact"}, "<think>\n5\n</think>\n\n4", "<think>4</think> 5"),
        ({"match": "number"}, "<think>5</think> 4", "<think>4</think> none"),
        ({"match": "number"}, "2 plus 2 is 4.0", "4 is 5"),
        ({"match": "number"}, "That makes 4", "none"),
        ({"match": "pattern", "pattern": r"\b4\b"}, "so 4", "so 44"),
    ],
)
def test_a_verifier_says_right_or_wrong(options, right, wrong):
    score = Verifier(**options).scorer(Place(source=JsonLines(path="rows.jsonl")))
    assert score([candidate(right), candidate(wrong)]).tolist() == [1.0, 0.0]


def test_what_came_to_no_end_is_not_right():
    place = Place(source=JsonLines(path="rows.jsonl"))
    unfinished = candidate("4", finished=False)
    assert Verifier().scorer(place)([unfinished]).tolist() == [0.0]
    assert Verifier(unfinished=None).scorer(place)([unfinished]).tolist() == [1.0]


def test_a_verifier_that_fails_names_the_row_unless_it_counts_as_wrong():
    place = Place(source=Failing(path="rows.jsonl"))
    with pytest.raises(DataError, match=r"rows\.jsonl:3: verifying failed \(RuntimeError: no such task\)"):
        Verifier().scorer(place)([candidate("4")])
    assert Verifier(on_error="zero").scorer(place)([candidate("4")]).tolist() == [0.0]


def test_without_an_answer_nothing_is_right_or_wrong():
    row = Row({"prompt": "2 + 2 ="}, "rows.jsonl:9")
    for options in ({}, {"match": "number"}):
        score = Verifier(**options).scorer(Place(source=JsonLines(path="rows.jsonl")))
        with pytest.raises(DataError, match=r"rows\.jsonl:9: nothing says which answers are right"):
            score([candidate("4", row=row)])


@pytest.mark.parametrize(
    "options", [{"match": "pattern"}, {"pattern": "x"}, {"match": "pattern", "pattern": "("}]
)
def test_a_pattern_and_its_match_belong_together(options):
    with pytest.raises(ConfigError, match=r"reward_models\.verifier"):
        Verifier(**options)


def test_penalties():
    found = [candidate("", tokens=7, finished=False), candidate("", tokens=3)]
    assert Length(per_token=0.5, free=4).scorer(Place())(found).tolist() == [-1.5, 0.0]
    assert MissingEnd(penalty=2.0).scorer(Place())(found).tolist() == [-2.0, 0.0]
    with pytest.raises(ConfigError, match=r"length\.free=-1 must not be negative"):
        Length(free=-1)


def vowels(prompts, completions, rows):
    assert all(isinstance(text, str) for text in [*prompts, *completions])
    return [sum(letter in "aeiou" for letter in text) + (row or {}).get("bonus", 0)
            for text, row in zip(completions, rows, strict=True)]  # fmt: skip


def broken(prompts, completions, rows):
    return [1 / 0]


def short(prompts, completions, rows):
    return [1.0]


@pytest.fixture
def entry_points(monkeypatch):
    entries = [
        importlib.metadata.EntryPoint(name, f"{__name__}:{name}", GROUP)
        for name in ("vowels", "broken", "short")
    ]
    monkeypatch.setattr("luthier_plugins.reward_models.function.entry_points", lambda group: entries)


def test_any_callable_by_entry_point(entry_points):
    row = Row({"prompt": "", "bonus": 10}, "row")
    score = Function(function="vowels").scorer(Place())
    assert score([candidate("banana", row=row), candidate("sky", row=None)]).tolist() == [13.0, 0.0]
    assert Function(function="vowels").score(["a"], ["see"]).tolist() == [2.0]


@pytest.mark.parametrize(
    ("name", "error", "told"),
    [
        ("vowls", ConfigError, "unknown reward_models.function.function 'vowls': did you mean 'vowels'"),
        ("broken", DataError, "broken failed: ZeroDivisionError"),
        ("short", DataError, "short gave 1 scores for 2 completions"),
    ],
)
def test_a_callable_that_cannot_be_used_is_told(entry_points, name, error, told):
    with pytest.raises(error, match=told):
        Function(function=name).scorer(Place())([candidate("a"), candidate("b")])


@pytest.mark.parametrize(
    ("aggregate", "expected"), [("min", 0.5), ("prod", 0.2), ("mean", 1.9 / 3), ("last", 0.8)]
)
def test_steps_become_one_number(aggregate, expected):
    steps = torch.tensor([0.5, 0.6, 0.8]) if aggregate != "prod" else torch.tensor([0.5, 0.5, 0.8])
    assert Process(aggregate=aggregate).aggregated(steps) == pytest.approx(expected, rel=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward-models")
    save_tiny(path / "base")
    letters = "abcdefgh"
    pairs = [{"prompt": f"{a} then", "chosen": f" {a}{a}", "rejected": f" {a} no"} for a in letters]
    steps = [{"prompt": f"{a}?", "steps": [f"{a} is {a}", "no"], "labels": [1, 0]} for a in letters]
    write_rows(path / "reward.jsonl", pairs)
    write_rows(path / "process_reward.jsonl", steps)
    for objective in ("reward", "process_reward"):
        train(compose("train", [
            f"model.path={path}/base", "model.dtype=float32", "data=jsonl",
            f"data.path={path}/{objective}.jsonl", f"objective={objective}", "optimiser.lr=1e-2",
            "adapter.dropout=0", "adapter.rank=4", "epochs=10", f"run_dir={path}/{objective}", "tracker=[]",
        ]))  # fmt: skip
    return path


@pytest.mark.slow
def test_an_outcome_model_prefers_what_it_learned_to(folder):
    score = Outcome(model=str(folder / "reward")).scorer(Place(dtype="float32"))
    found = score([Candidate("c then", text) for text in (" cc", " c no")])
    assert found[0] > found[1] + 1


def test_a_process_model_finds_the_wrong_step(folder):
    model = Process(model=str(folder / "process_reward"), aggregate="min")
    score = model.scorer(Place(dtype="float32"))
    right, wrong, none = score([Candidate("c?", text) for text in ("c is c", "c is c\nno", "")]).tolist()
    assert right > 0.9
    assert wrong < 0.1
    assert none == 0.0
    last = Process(model=str(folder / "process_reward"), aggregate="prod").scorer(Place(dtype="float32"))
    assert last([Candidate("c?", "c is c\nno")]).item() <= wrong + 1e-6


def test_every_weight_is_an_option():
    assert Length(weight=0.5).weight == 0.5
    assert math.isfinite(Outcome().weight)
