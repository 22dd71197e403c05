"""Hub data sets, tried on a folder laid out like one: there is no hub in a test."""

import json

import pytest

from helpers import write_rows
from luthier import ConfigError
from luthier_plugins.data_sources.hub import Hub


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        rows = [{"text": f"{split} {i}"} for i in range(5)]
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


@pytest.mark.parametrize("streaming", [True, False])
def test_rows_of_a_split_come_with_their_place(dataset, streaming):
    found = list(Hub(path=str(dataset), split="test", streaming=streaming, limit=3).rows())
    assert [row.fields["text"] for row in found] == ["test 0", "test 1", "test 2"]
    assert found[2].origin == f"{dataset}/test[2]"


def test_a_broken_file_is_told_by_its_cause(dataset):
    (dataset / "train.jsonl").write_text('{"text": "a"}\n{"other": 5}\n{')
    with pytest.raises(ConfigError, match="JSON"):
        list(Hub(path=str(dataset)).rows())


def test_keys_that_only_other_rows_have_are_absent(dataset):
    calls = [[{"arguments": {"a": 1}}], [{"arguments": {"b": 2}}]]
    (dataset / "test.jsonl").unlink()
    (dataset / "train.jsonl").write_text("".join(json.dumps({"calls": one}) + "\n" for one in calls))
    assert [row.fields["calls"] for row in Hub(path=str(dataset)).rows()] == calls


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"split": "dev"}, r"the hub gives no such data set now: .*dev"),
        ({"path": "nobody/has-this"}, r"path=nobody/has-this: the hub gives no such data set now: "),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(dataset, options, told):
    with pytest.raises(ConfigError, match=told) as caught:
        list(Hub(**{"path": str(dataset), **options}).rows())
    assert "\n" not in str(caught.value)
