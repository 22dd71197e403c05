"""Parquet: rows in batches, and what is wrong with a file."""

import pyarrow
import pytest
from pyarrow import parquet

from luthier import ConfigError, DataError
from luthier_plugins.data_sources.parquet import Parquet


def test_rows_come_in_order_from_batches(tmp_path):
    file = tmp_path / "rows.parquet"
    talk = [[{"role": "user", "content": str(i)}] for i in range(7)]
    parquet.write_table(pyarrow.table({"messages": talk, "id": list(range(7))}), file)
    found = list(Parquet(path=str(file), batch_rows=3).rows())
    assert [row.fields["id"] for row in found] == list(range(7))
    assert found[4].fields["messages"] == talk[4]
    assert found[4].origin == f"{file}[4]"
    assert len(list(Parquet(path=str(file), limit=2).rows())) == 2


def test_keys_that_only_other_rows_have_are_absent(tmp_path):
    file = tmp_path / "rows.parquet"
    calls = [[{"arguments": {"a": 1}}], [{"arguments": {"b": [None]}}]]
    parquet.write_table(pyarrow.table({"calls": calls, "label": [None, 1]}), file)
    assert [row.fields for row in Parquet(path=str(file)).rows()] == [
        {"calls": calls[0], "label": None}, {"calls": calls[1], "label": 1},
    ]  # fmt: skip


def test_a_batch_has_rows():
    with pytest.raises(ConfigError, match="batch_rows=0 must be at least 1"):
        Parquet(path="x", batch_rows=0)


def test_a_broken_file_is_named(tmp_path):
    file = tmp_path / "rows.parquet"
    file.write_text("no table")
    with pytest.raises(DataError, match=r"rows.parquet: not a Parquet file that can be read: ") as caught:
        list(Parquet(path=str(file)).rows())
    assert "\n" not in str(caught.value)
    file.write_text("")
    with pytest.raises(DataError, match=r"rows.parquet: the file is empty; expected a Parquet table"):
        list(Parquet(path=str(file)).rows())
    parquet.write_table(pyarrow.table({"a": pyarrow.array([], pyarrow.string())}), file)
    with pytest.raises(DataError, match="the file is empty"):
        list(Parquet(path=str(file)).rows())
    with pytest.raises(ConfigError, match="there is no such file"):
        list(Parquet(path=str(tmp_path / "none.parquet")).rows())
