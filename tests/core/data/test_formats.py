"""Layouts: every known one becomes what objectives take, and a row that is none is named."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from luthier import DataError, DataSource, Row
from luthier.data.formats import laid_out


@dataclass(frozen=True)
class Nothing(DataSource):
    """A source of no rows, for its options."""

    def rows(self) -> Iterator[Row]:
        yield from ()


def fields(row: dict, chat: bool = True, **options) -> dict:
    return dict(laid_out(Row(row, "f:3"), Nothing(**options), chat).fields)


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def test_sharegpt_becomes_messages():
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert fields({"conversations": turns, "id": 7}) == {
        "messages": [{"role": "system", "content": "s"}, USER, ANSWER],
        "id": 7,
    }


def test_sharegpt_calls_of_functions_become_tool_calls():
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "a"},
    ]
    found = fields({"conversations": turns, "tools": '[{"name": "add"}]'})
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    assert found["messages"] == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "observation", "content": "2"},
        ANSWER,
    ]  # fmt: skip
    assert found["tools"] == [{"name": "add"}]


def test_instructions_become_chats_or_text_without_a_template():
    row = {"instruction": "Add.", "input": "1 + 1", "output": "2", "system": "Be short."}
    found = fields(row)
    assert found["prompt"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Add.\n\n1 + 1"},
    ]
    assert found["completion"] == [{"role": "assistant", "content": "2"}]
    assert fields({"instruction": "q", "input": "", "output": "a"})["prompt"] == [USER]
    plain = fields(row, chat=False)
    assert (plain["prompt"], plain["completion"]) == ("Be short.\n\nAdd.\n\n1 + 1\n\n", "2")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "a"},
        {"messages": [USER, ANSWER]},
        {"text": "t"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"conversations": [], "chosen": "a", "rejected": "b"},
        {"prompt": "q", "steps": ["a"], "labels": [True]},
        {},
    ],
)
def test_what_objectives_know_passes_as_it_is(row):
    assert fields(row) == row


def test_columns_are_renamed_and_decide_what_is_meant():
    row = {"question": "q", "reply": "a", "messages": [USER, ANSWER], "id": 1}
    found = fields(row, columns={"prompt": "question", "completion": "reply"})
    assert found == {"prompt": "q", "completion": "a", "id": 1}
    assert fields({"q": "a b"}, columns={"text": "q"}) == {"text": "a b"}


def test_a_layout_can_be_forced_where_a_row_has_several():
    row = {"text": "t", "messages": [USER, ANSWER], "instruction": "q", "output": "a"}
    assert fields(row, format="text") == {"text": "t"}
    assert fields(row, format="instruction") == {"prompt": [USER], "completion": [ANSWER]}
    assert fields(row) == {"messages": row["messages"]}


def test_a_column_of_another_layout_does_not_decide_which_rows_are_the_same():
    # UltraChat's: the first question stands once more in a column `prompt`.
    talks = [[USER, {"role": "assistant", "content": answer}] for answer in ("a", "b")]
    rows = [Row({"prompt": "q", "messages": talk, "id": i}, f"f:{i}") for i, talk in enumerate(talks)]
    both = [laid_out(row, Nothing(), True).fields for row in rows]
    assert both == [{"messages": talk, "id": i} for i, talk in enumerate(talks)]


@pytest.mark.parametrize("chat", [{"messages": [USER, ANSWER]}, {"conversations": [
    {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}])  # fmt: skip
def test_a_column_system_begins_the_conversation(chat):
    first = {"role": "system", "content": "Be short."}
    assert fields({**chat, "system": "Be short."})["messages"] == [first, USER, ANSWER]
    assert fields({**chat, "system": ""})["messages"] == [USER, ANSWER]
    assert fields({**chat, "system": None})["messages"] == [USER, ANSWER]
    own = {"role": "system", "content": "Mine."}
    assert fields({"messages": [own, USER], "system": "Be short."})["messages"] == [own, USER]


def test_a_row_of_a_mixture_follows_its_own_source():
    child = Nothing(columns={"text": "body"})
    assert laid_out(Row({"body": "t"}, "f:1", child), Nothing(format="messages"), True).fields == {
        "text": "t"
    }


@pytest.mark.parametrize(
    ("row", "options", "told"),
    [
        ({"question": "q"}, {"columns": {"prompt": "qestion"}},
         "f:3: there is no column 'qestion' (columns.prompt): did you mean 'question'? the row has question"),
        ({"promt": "q", "completion": "a"}, {"format": "completion"},
         "f:3: format=completion needs prompt, completion; the row has promt, completion; "
         "did you mean 'promt'? say which column it is with columns.prompt=NAME"),
        ({"conversations": 5}, {}, "f:3: conversations must be text or a list of messages, got int"),
        ({"conversations": []}, {}, "f:3: conversations must be text or a list of messages, got"),
        ({"conversations": ["hi"]}, {}, "f:3: conversations, message 1: expected {'role': …, 'content': …}"),
        ({"conversations": [{"from": "humn", "value": "q"}]}, {},
         "f:3: conversations, message 1: unknown role 'humn': did you mean 'human'?"),
        ({"conversations": [{"from": "gpt", "value": None}]}, {},
         "f:3: conversations, message 1: content must be text, got NoneType"),
        ({"conversations": [{"from": "function_call", "value": "add(1)"}]}, {},
         "f:3: conversations, message 1: calls: not JSON: Expecting value at column 1"),
        ({"conversations": [{"from": "function_call", "value": "[1]"}]}, {},
         "f:3: conversations, message 1: tool_calls must be a list of calls"),
        ({"instruction": 5, "output": "a"}, {}, "f:3: instruction must be text, got int"),
        ({"instruction": "q", "output": ["a"]}, {}, "f:3: output must be text, got list"),
        ({"instruction": " ", "output": "a"}, {}, "f:3: the instruction is empty"),
        ({"messages": [USER], "tools": "{"}, {}, "f:3: tools: not JSON"),
        ({"messages": [USER], "system": 5}, {}, "f:3: system must be text, got int"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_with_the_row(row, options, told):
    with pytest.raises(DataError) as caught:
        fields(row, **options)
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "begun"),
    [
        ({"prompt": [USER], "completion": [ANSWER]}, {"prompt"}),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, {"prompt"}),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, {"chosen", "rejected"}),
        (
            {"prompt": USER["content"], "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]},
            {"chosen", "rejected"},
        ),
        (
            {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]},
            {"prompt", "chosen", "rejected"},
        ),
    ],
)
def test_a_column_system_is_lost_in_no_layout(fields, begun):
    # Intel's orca pairs have it beside prompt, chosen and rejected: it was left out without a word.
    row = laid_out(Row({**fields, "system": "be short"}, "f:1"), Nothing(), True).fields
    system = {"role": "system", "content": "be short"}
    assert {name for name in fields if row[name][0] == system} == begun
    for name in fields:
        assert list(row[name])[name in begun :] == list(fields[name])
    own = {name: [system, *fields[name]] if name in begun else fields[name] for name in fields}
    assert {
        name: laid_out(Row({**own, "system": "no"}, "f:1"), Nothing(), True).fields[name] for name in own
    } == own


def test_a_prompt_that_is_a_text_begins_with_the_column_system():
    for more in ({"completion": "b"}, {"chosen": "b", "rejected": "c"}):
        row = laid_out(Row({"system": "be short", "prompt": "a", **more}, "f:1"), Nothing(), True)
        assert {name: row.fields[name] for name in ("prompt", *more)} == {"prompt": "be short\n\na", **more}
