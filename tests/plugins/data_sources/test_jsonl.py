"""JSON Lines: rows with their line, and what is wrong with a file."""

import pytest

from luthier import ConfigError, DataError, Row
from luthier_plugins.data_sources.jsonl import JsonLines


def test_rows_carry_file_and_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a"}\n\n{"prompt": "ü"}\n{"prompt": "c"}\n', encoding="utf-8")
    rows = list(JsonLines(str(file), limit=2).rows())
    assert [(row.fields["prompt"], row.origin) for row in rows] == [("a", f"{file}:1"), ("ü", f"{file}:3")]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"a": 1}\n{"a": \n', r"rows.jsonl:2: not JSON: .* at column"),
        ("[1, 2]\n", r"rows.jsonl:1: expected a JSON object, got list"),
        ('[\n{"a": 1}\n]\n', r"rows.jsonl:1: a list over several lines, expected .* try data=json"),
        ('{"a": 1}\n{"a": 1, "b": 2, "a": 3}\n', r"rows.jsonl:2: not JSON .* the key 'a' comes twice"),
        ("", r"rows.jsonl: the file is empty"),
    ],
)
def test_a_broken_file_is_named_by_line(tmp_path, text, told):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(DataError, match=told):
        list(JsonLines(str(tmp_path / "rows.jsonl")).rows())


def test_windows_files_are_read_and_other_encodings_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    assert [row.fields["a"] for row in JsonLines(str(file)).rows()] == [1, 2]
    file.write_bytes('{"a": 1}\n{"a": "ü"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"rows.jsonl:2: not UTF-8 at byte 8"):
        list(JsonLines(str(file)).rows())


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"path=nowhere.jsonl: there is no such file"):
        list(JsonLines("nowhere.jsonl").rows())
    with pytest.raises(ConfigError, match=r"path=/dev/null: is a pipe or device, expected a file"):
        list(JsonLines("/dev/null").rows())


def test_an_answer_is_compared_up_to_white_space_at_the_ends():
    source = JsonLines("x")
    row = Row({"prompt": "p", "completion": " 12\n"}, "x:1")
    assert source.verify(row, "12 ") == 1.0
    assert source.verify(row, "1 2") == 0.0
    assert source.verify(Row({"completion": "no", "answer": "yes"}, "x:1"), "yes") == 1.0
    assert source.verify(Row({"messages": []}, "x:1"), "yes") is None
