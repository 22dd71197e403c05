"""JSON files: a list of rows, wherever it stands, and what is wrong with a file."""

import json

import pytest

from luthier import DataError
from luthier_plugins.data_sources.json_file import Json

ROWS = [{"text": "a"}, {"text": "ü"}]


def rows(path, **options):
    return [(row.fields, row.origin) for row in Json(path=str(path), **options).rows()]


def test_a_list_is_read_and_an_object_with_one(tmp_path):
    file = tmp_path / "rows.json"
    expected = [(row, f"{file}[{index}]") for index, row in enumerate(ROWS)]
    file.write_text(json.dumps(ROWS), encoding="utf-8")
    assert rows(file) == expected
    assert rows(file, limit=1) == expected[:1]
    file.write_text(json.dumps({"version": 1, "data": ROWS}), encoding="utf-8")
    assert rows(file) == expected
    file.write_text(json.dumps({"old": [], "data": ROWS}), encoding="utf-8")
    assert rows(file, key="data") == expected


@pytest.mark.parametrize(
    ("text", "options", "told"),
    [
        ('[{"a": 1},\n {"a": }]', {}, r"rows.json: not JSON: Expecting value at line 2, column 8"),
        ("[1]", {}, r"rows.json\[0\]: expected a JSON object, got int"),
        ("5", {}, r"rows.json: expected a list of objects, got int"),
        ("[]", {}, r"rows.json: the file is empty; expected a list of objects"),
        (" \n", {}, r"rows.json: the file is empty"),
        ('{"a": [], "b": []}', {}, r"expected an object with one list; lists: a, b; choose one with key"),
        ('{"a": 1}', {}, r"expected an object with one list; lists: none"),
        ('{"rows": []}', {"key": "row"}, r"unknown key of a list 'row': did you mean 'rows'\?"),
        ("[" * 100_000, {}, r"rows.json: not JSON that can be read"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, options, told):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=told):
        rows(tmp_path / "rows.json", **options)
