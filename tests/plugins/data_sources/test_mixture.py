"""Mixtures: shares by weight, the same draw for the same seed, and each row its own source's."""

from collections import Counter

import pytest

from helpers import write_rows
from luthier import ConfigError, DataError, LuthierError, compose
from luthier.config.building import build
from luthier_plugins.data_sources.mixture import Mixture


@pytest.fixture
def files(tmp_path):
    for name, count in (("a", 900), ("b", 100)):
        rows = [{"prompt": f"{name}{i}", "completion": name, "answer": name} for i in range(count)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


def sources(files, **weights):
    return {
        name: {"name": "jsonl", "path": f"{files}/{name}.jsonl", "weight": weight}
        for name, weight in weights.items()
    }


def drawn(files, *, a=1.0, b=1.0, **options):
    return [row.fields["prompt"] for row in Mixture(sources=sources(files, a=a, b=b), **options).rows()]


def test_shares_are_the_weights_and_the_first_source_that_ends_ends_it(files):
    found = Counter(name[0] for name in drawn(files, a=3))
    assert found["b"] == 100
    # Three in four of about 400: standard deviation 20.
    assert 220 < found["a"] < 380


def test_the_same_seed_draws_the_same_rows_and_another_others(files):
    assert drawn(files, seed=1) == drawn(files, seed=1)
    assert drawn(files, seed=1) != drawn(files, seed=2)
    assert drawn(files, limit=7, seed=1) == drawn(files, seed=1)[:7]


def test_rows_of_a_source_keep_their_order_and_all_are_read_once(files):
    found = drawn(files, until="all")
    assert sorted(found) == sorted({*found})
    assert len(found) == 1000
    assert [name for name in found if name[0] == "a"] == [f"a{i}" for i in range(900)]


def test_a_short_source_is_repeated_until_the_long_one_was_read(files):
    found = Counter(drawn(files, until="repeat"))
    assert {found[f"a{i}"] for i in range(900)} == {1}
    assert found["b0"] > 5


def test_rows_are_renamed_and_verified_by_their_own_source(files):
    nodes = sources(files, a=1, b=1)
    nodes["b"]["columns"] = {"text": "prompt"}
    mixture = Mixture(sources=nodes, columns={"completion": "answer"})
    by_name = {row.fields["prompt"][0]: row for row in mixture.rows()}
    assert by_name["a"].source.columns == {"completion": "answer"}
    assert by_name["b"].source.columns == {"text": "prompt"}
    assert mixture.verify(by_name["a"], "a") == 1.0
    assert mixture.verify(by_name["b"], "a") == 0.0


def test_a_mixture_is_composed_from_the_command_line(files):
    config = compose("train", [
        "model.path=m", "data=mixture", f"data.sources.a={{name: jsonl, path: {files}/a.jsonl, weight: 2}}",
        f"data.sources.b={{name: mixture, sources: {{c: {{name: jsonl, path: {files}/b.jsonl}}}}}}",
    ])  # fmt: skip
    assert len(list(build("data_source", config.data).rows())) > 200


@pytest.mark.parametrize(
    ("node", "told"),
    [
        ({}, "sources is empty; give"),
        ({"a": "a.jsonl"}, "sources.a: expected {name: METHOD, weight: 1.0, …}, got 'a.jsonl'"),
        ({"a": {"path": "x"}}, r"sources.a: expected {name: DATA_SOURCE, …}"),
        ({"a": {"name": "jsnl", "path": "x"}}, "sources.a: unknown data_source 'jsnl': did you mean 'jsonl'"),
        ({"a": {"name": "jsonl", "pth": "x"}}, "sources.a: jsonl: unknown option 'pth': did you mean 'path'"),
        ({"a": {"name": "jsonl"}}, "sources.a: jsonl: path must be set"),
        ({"a": {"name": "jsonl", "path": "x", "limit": "many"}}, r"sources.a: limit: Value 'many'"),
        ({"a": {"name": "jsonl", "path": "x", "weight": 0}}, "sources.a: weight=0 must be a positive number"),
    ],
)
def test_a_mistake_in_a_source_is_one_line_that_names_it(node, told):
    with pytest.raises(LuthierError, match=told) as caught:
        Mixture(sources=node)
    assert "\n" not in str(caught.value)


def test_limits_that_read_nothing_are_refused(files):
    with pytest.raises(ConfigError, match="limit=0 must be at least 1"):
        drawn(files, limit=0)
    (files / "b.jsonl").write_text("")
    with pytest.raises(DataError, match=r"b.jsonl: the file is empty"):
        drawn(files)
