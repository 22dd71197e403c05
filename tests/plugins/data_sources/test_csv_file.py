"""CSV and TSV: cells as they are, lines as editors count them, and what is wrong with a file."""

import itertools

import pytest

from luthier import ConfigError, DataError
from luthier_plugins.data_sources.csv_file import Csv


def rows(path, **options):
    return [(dict(row.fields), row.origin) for row in Csv(path=str(path), **options).rows()]


def test_rows_carry_the_line_they_begin_on(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_bytes(b'\xef\xbb\xbfprompt, completion\n"a, ""b""\nc",d\n\ne,\xc3\xbc\n')
    assert rows(file) == [
        ({"prompt": 'a, "b"\nc', "completion": "d"}, f"{file}:2"),
        ({"prompt": "e", "completion": "ü"}, f"{file}:5"),
    ]


def test_tabs_and_other_delimiters(tmp_path):
    (tmp_path / "rows.tsv").write_text("a\tb\n1,5\t2\n")
    assert rows(tmp_path / "rows.tsv")[0][0] == {"a": "1,5", "b": "2"}
    (tmp_path / "rows.csv").write_text("a;b\n1,5;2\n")
    assert rows(tmp_path / "rows.csv", delimiter=";")[0][0] == {"a": "1,5", "b": "2"}


def test_a_cell_may_be_as_long_as_a_document(tmp_path):
    (tmp_path / "rows.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(rows(tmp_path / "rows.csv")[0][0]["text"]) == 200_000


def test_a_file_is_read_no_further_than_its_rows_are_asked_for(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"text\n" + b"a\n" * 100_000 + b"\xff\n")
    found = list(itertools.islice(Csv(path=str(tmp_path / "rows.csv")).rows(), 3))
    assert [row.fields["text"] for row in found] == ["a"] * 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a,b\n1,2\n1,2,3\n", r"rows.csv:3: 3 cells for the 2 columns a, b; quote a cell"),
        ("a,b\n1\n", r"rows.csv:2: 1 cells for the 2 columns"),
        ("a,a\n1,2\n", r"rows.csv:1: two columns are called 'a'"),
        ('a\n"b\nc\n', r"rows.csv:2: not CSV: unexpected end of data"),
        ("", r"rows.csv: the file is empty; expected a line with the names of the columns"),
        ("a,b\n", r"rows.csv: the file is empty"),
    ],
)
def test_a_broken_file_is_named_by_line(tmp_path, text, told):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(DataError, match=told):
        rows(tmp_path / "rows.csv")


def test_a_delimiter_is_one_character():
    with pytest.raises(ConfigError, match="delimiter='ab' must be one character"):
        Csv(path="x", delimiter="ab")
