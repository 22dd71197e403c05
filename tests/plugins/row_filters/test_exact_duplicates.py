"""Duplicates: the first stays, whatever its id and spacing; the header counts the others."""

import pytest

from helpers import tiny_tokenizer
from luthier import Codec, DataError, Row
from luthier.data.data import encode
from luthier_plugins.data_sources.jsonl import JsonLines
from luthier_plugins.objectives.sft import SFT
from luthier_plugins.row_filters.exact_duplicates import ExactDuplicates


def kept(*fields, **options):
    duplicates = ExactDuplicates(**options)
    return [isinstance(duplicates.keep(Row(one, "f:1")), Row) for one in fields]


def test_rows_that_say_the_same_are_dropped_whatever_their_id_and_spacing():
    first = {"prompt": "a  b", "completion": "é", "id": 1}
    assert kept(first, {"prompt": "a b\n", "completion": "e\u0301", "id": 2}) == [True, False]
    assert kept(first, {**first, "completion": "f"}) == [True, True]
    assert kept(first, {**first, "prompt": "A b"}) == [True, True]
    assert kept(first, {**first, "prompt": "A b"}, ignore_case=True) == [True, False]
    assert kept(first, {**first, "completion": "f"}, columns=("prompt",)) == [True, False]
    assert kept({"prompt": "ab"}, {"text": "ab"}, {"a": 1}, {"a": 2}, {"a": 1}) == [True] * 4 + [False]


def test_conversations_are_compared_whole():
    def talk(answer):
        return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]}

    assert kept(talk("a"), talk("b"), talk(" a")) == [True, True, False]


def test_a_column_that_is_not_there_makes_no_rows_the_same():
    told = "f:1: exact_duplicates.columns: unknown column 'promt': did you mean 'prompt'"
    with pytest.raises(DataError, match=told):
        kept({"prompt": "a"}, {"prompt": "b"}, columns=("promt",))


def test_the_header_counts_them(tmp_path):
    row = '{"instruction": "q", "output": "a"}\n'
    (tmp_path / "rows.jsonl").write_text(row * 3 + '{"instruction": "q", "output": "b"}\n')
    source, codec = JsonLines(path=str(tmp_path / "rows.jsonl")), Codec(tiny_tokenizer())
    data = encode(source, SFT(), codec, 64, filters=[ExactDuplicates()])
    assert len(data) == 2
    assert data.lines("data")[1] == "          dropped: 2 exact duplicates"
