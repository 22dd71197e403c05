"""Folders: every file by its own source, in the order of names."""

import gzip
import json

import pytest

from luthier import ConfigError, DataError
from luthier_plugins.data_sources.folder import Folder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b.csv").write_text("text\nb1\nb2\n")
    (tmp_path / "a.jsonl").write_text('{"text": "a1"}\n')
    (tmp_path / "README.md").write_text("not rows")
    (tmp_path / ".hidden.csv").write_text("text\nno\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.json").write_text(json.dumps([{"text": "c1"}]))
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write('{"text": "d1"}\n')
    return tmp_path


def texts(folder, **options):
    return [row.fields["text"] for row in Folder(path=str(folder), **options).rows()]


def test_files_are_read_in_the_order_of_their_names_each_by_its_own_source(folder):
    assert texts(folder) == ["a1", "b1", "b2", "d1", "c1"]
    assert texts(folder, recursive=False) == ["a1", "b1", "b2", "d1"]
    assert texts(folder, suffix=".csv") == ["b1", "b2"]
    assert texts(folder, limit=2) == ["a1", "b1"]
    origins = [row.origin for row in Folder(path=str(folder)).rows()]
    assert origins[1] == f"{folder}/b.csv:2"


def test_rows_follow_the_folders_columns_and_are_verified_by_their_files_source(folder):
    source = Folder(path=str(folder), columns={"completion": "text"}, format="text")
    row = next(source.rows())
    assert (row.source.columns, row.source.format) == ({"completion": "text"}, "text")
    assert source.verify(row, "x") is None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"path": "nowhere"}, "path=nowhere: there is no such folder"),
        ({"suffix": ".txt"}, r"suffix=.txt: no source reads such files; known: .*\.csv"),
        ({"suffix": ".parquet"}, r"holds no file that ends with .parquet"),
    ],
)
def test_what_cannot_be_read_is_told(folder, options, told):
    with pytest.raises(ConfigError, match=told):
        texts(options.pop("path", folder), **options)
    with pytest.raises(ConfigError, match="is a file, expected a folder"):
        texts(folder / "b.csv")


def test_a_broken_or_empty_file_among_them_is_named(folder):
    (folder / "deep" / "e.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"deep/e.jsonl:1: not JSON"):
        texts(folder)
    (folder / "deep" / "e.jsonl").write_text("")
    with pytest.raises(DataError, match=r"deep/e.jsonl: the file is empty"):
        texts(folder)
