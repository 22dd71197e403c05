"""Whatever a row holds, the answer is a tree or one clear line that names the row, never a traceback."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings, strategies as st

from helpers import tiny_tokenizer
from luthier import Codec, LuthierError, Row
from luthier.data.data import encode
from luthier.data.formats import LAYOUTS
from luthier_plugins.data_sources.csv_file import Csv
from luthier_plugins.data_sources.json_file import Json
from luthier_plugins.data_sources.jsonl import JsonLines
from luthier_plugins.objectives.sft import SFT
from luthier_plugins.row_filters.exact_duplicates import ExactDuplicates

TALKING, MUTE = Codec(tiny_tokenizer(add_bos=True)), Codec(tiny_tokenizer())
MUTE.tokenizer.chat_template = None
NAMES = sorted(
    {name for names in LAYOUTS.values() for name in names} | {"input", "tools", "system", "chosen"}
)
QUICK = settings(max_examples=200, deadline=None, database=None)

text = st.text(st.characters(codec=None), max_size=8)
scalar = st.none() | st.booleans() | st.integers() | st.floats() | text
message = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool"]) | scalar,
        "from": st.sampled_from(["human", "gpt", "function_call", "x"]) | scalar,
        "content": scalar | st.lists(scalar, max_size=2),
        "value": scalar | st.just('{"name": "f"}'),
        "tool_calls": scalar | st.lists(st.dictionaries(text, scalar, max_size=1), max_size=2),
    },
)
value = scalar | st.lists(scalar | message, max_size=4) | st.dictionaries(text, scalar, max_size=2)
row = st.dictionaries(st.sampled_from(NAMES) | text, value, max_size=4)


def outcome(source, codec, **options) -> str:
    """Encode; return what was said, which must be one line, and empty if trees came out."""
    try:
        data = encode(source, SFT(), codec, 64, **options)
    except LuthierError as error:
        return str(error)
    assert len(data)
    assert all(tree.scored_tokens for tree in data.trees)
    return ""


class Listed(JsonLines):
    """Rows that are there already."""

    listed: list[Row]

    def rows(self):
        yield from self.listed


@pytest.mark.parametrize("layout", ["auto", *LAYOUTS])
@QUICK
@given(fields=row, chat=st.booleans(), supervise=st.booleans())
@example(fields={"prompt": "a", "completion": ""}, chat=True, supervise=False)
@example(fields={"messages": [{"role": "user", "content": "\ud800"}] * 2}, chat=True, supervise=False)
def test_a_malformed_row_of_every_layout_is_one_line(layout, fields, chat, supervise):
    source = Listed(path="rows.jsonl", format=layout)
    object.__setattr__(source, "listed", [Row(fields, "rows.jsonl:7")])
    told = outcome(source, TALKING if chat else MUTE, filters=[ExactDuplicates()] * supervise)
    assert not told or "rows.jsonl:7: " in told or "no usable row" in told
    assert len(told.splitlines()) <= 1


@QUICK
@given(
    content=st.binary(max_size=40)
    | st.builds(lambda one: json.dumps(one).encode(), st.lists(row, max_size=3))
)
@example(content=b"[" * 100_000)
@example(content=b'{"text": ' + b"1" * 5000 + b"}")
@example(content=b'text\n"a\n')
@example(content=b'{"text": "a\\ud800"}')
@pytest.mark.parametrize("reader", [JsonLines, Json, Csv])
@pytest.mark.slow
def test_a_malformed_file_of_every_kind_is_one_line_with_its_name(reader, content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.data"
        path.write_bytes(content)
        told = outcome(reader(path=str(path)), TALKING)
    assert not told or "rows.data" in told or "no usable row" in told
    assert len(told.splitlines()) <= 1
