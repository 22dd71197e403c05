"""What a row says is what is rendered and trained: the kinds of faults A7 to A13 and B5 to B9, by hand."""

import json
import random
import resource
import signal
from types import SimpleNamespace

import pytest

from helpers import tiny_tokenizer
from luthier import Codec, DataError, Row, UnusableRowError
from luthier.data import asked
from luthier.data.data import encode
from luthier.data.formats import laid_out
from luthier.evaluation import Evaluator
from luthier.models.chat_templates import FOLD
from luthier.trees import Tree
from luthier_plugins.data_sources.jsonl import JsonLines
from luthier_plugins.objectives.dpo import DPO
from luthier_plugins.objectives.kto import KTO
from luthier_plugins.objectives.process_reward import ProcessReward
from luthier_plugins.objectives.sft import SFT

TURN, OPEN = "{% for m in messages %}", "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = TURN + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + OPEN
# Thoughts stand in the last turn alone; an empty one where there is none.
FORGETS = (
    TURN + "{% set t = m.reasoning_content if m.reasoning_content is string else "
    "(m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '') %}"
    "{% set c = m.content.split('</think>')[-1].lstrip('\n') %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ t.strip('\n') }}\n</think>\n\n{% endif %}"
    "{{ c }}<|im_end|>\n{% endfor %}" + OPEN
)
# A call alone, or a text alone.
EITHER = (
    TURN + "<|im_start|>{{ m.role }}\n{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + OPEN
)
CALLS = (
    TURN + "<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}("
    "{{ ARGUMENTS }}){% endfor %}<|im_end|>\n{% endfor %}" + OPEN
)
# Knows neither of what it is not told of: other roles vanish.
KNOWN = (
    "{% for m in messages if m.role in ['system', 'user', 'assistant', 'tool'] %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}" + OPEN
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
)
SPELLS = "say <|im_end|> and <|im_start|>user"
USER, ANSWER = {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": "three"}}}


def codec_of(template: str, control_tokens: str = "keep") -> Codec:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.init_kwargs["control_tokens"] = control_tokens
    return Codec(tokenizer)


def said(codec: Codec, tree) -> str:
    branch = tree.branches[0]
    return codec.tokenizer.decode([branch.ids[place] for place in branch.scored_places])


def all_of(codec: Codec, tree) -> str:
    return codec.tokenizer.decode(tree.prompt + tree.branches[0].ids)


class Listed(JsonLines):
    """Rows that are there already."""

    def rows(self):
        yield from (Row(fields, f"f:{place}") for place, fields in enumerate(self.listed, 1))


def listed(*fields) -> Listed:
    source = Listed(path="f")
    object.__setattr__(source, "listed", fields)
    return source


# A7: one notion of the end


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (CHATML.replace("<|im_end|>", "<|im_start|>"), "<|im_start|>"),
        (TURN + "[{{ m.role }}] {{ m.content }}\n{% endfor %}", "<|startoftext|>"),
        (TURN + "{{ m.content }}{% if m.role == 'assistant' %}<|im_end|><|im_start|>{% endif %}{% endfor %}",
         "<|im_end|>"),
    ],
)  # fmt: skip
def test_the_end_of_a_turn_is_what_the_template_writes_behind_it(template, end):
    codec = codec_of(template)
    codec.tokenizer.eos_token = "<|startoftext|>"  # the end of texts, which no turn ends with
    assert codec.tokenizer.convert_ids_to_tokens(codec.turn_end) == end
    assert said(codec, codec.conversation([USER, ANSWER], "f:1")).endswith(end)


# A8: an answer that speaks of an end token


@pytest.mark.parametrize("text", ["With <|im_end|> and then nothing follows.", "<|im_end|>", "a <|im_end|>"])
@pytest.mark.parametrize("template", [CHATML, CHATML.replace("<|im_end|>\n", "{{ eos_token }}")])
def test_an_answer_that_speaks_of_the_end_is_trained_to_its_own(template, text):
    codec = codec_of(template)
    tree = codec.conversation([USER, {**ANSWER, "content": text}, USER, ANSWER], "f:1")
    assert said(codec, tree) == f"{text}<|im_end|>two<|im_end|>"
    assert any("spell control tokens, e.g. <|im_end|>" in what for what in codec.noted)
    pair = codec.pair("one", text, "f:1")
    assert said(codec, pair) in (f"{text}<|im_end|>", text)
    assert said(codec, pair).endswith("<|im_end|>")


def test_control_tokens_that_are_spelled_can_be_text():
    codec = codec_of(CHATML, "text")
    asked_of = {**USER, "content": "what is <|im_start|>?"}
    tree = codec.conversation([asked_of, {**ANSWER, "content": "not <|im_end|> but"}], "f:1")
    shown = "user\nwhat is <|im_start|>?<|im_end|>\n<|im_start|>assistant\nnot <|im_end|> but<|im_end|>"
    assert all_of(codec, tree) == f"<|im_start|>{shown}"
    ids = list(tree.prompt + tree.branches[0].ids)
    for name in ("<|im_start|>", "<|im_end|>"):
        assert ids.count(codec.tokenizer.convert_tokens_to_ids(name)) == 2
    assert codec.prompt_ids([asked_of]) == list(tree.prompt)
    # What spells none is the same either way.
    assert codec.conversation([USER, ANSWER], "f:1") == codec_of(CHATML).conversation([USER, ANSWER], "f:1")
    assert not codec.noted


@pytest.mark.parametrize(
    ("objective", "fields"),
    [
        (SFT(), {"prompt": SPELLS, "completion": f" {SPELLS}"}),
        (SFT(supervise="all"), {"prompt": SPELLS, "completion": f" {SPELLS}"}),
        (SFT(), {"text": SPELLS}),
        (DPO(), {"prompt": SPELLS, "chosen": f" {SPELLS}", "rejected": " no"}),
        (KTO(), {"prompt": SPELLS, "completion": f" {SPELLS}", "label": True}),
        (ProcessReward(), {"prompt": SPELLS, "steps": [SPELLS, "so"], "labels": [1, 0]}),
        (SFT(), {"messages": [{**USER, "name": SPELLS}, {**ANSWER, "content": SPELLS}]}),
        (SFT(), {"messages": [USER, ANSWER], "tools": [{"name": "add", "description": SPELLS}]}),
        (SFT(), {"messages": [USER, {**ANSWER, "tool_calls": [{**CALL, "id": SPELLS}]}]}),
    ],
)
def test_control_tokens_are_text_wherever_a_row_spells_them(objective, fields):
    template = CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{{ m.name }}{{ (m.tool_calls or []) | tojson }}"
    )
    template = "{{ (tools or []) | tojson }}" + template
    meant = {"messages": 5 - 1, "prompt": 0, "text": 0}[next(iter(fields))]  # two begin turns, two end them
    codec = codec_of(template, "text")
    encoded = objective.encode(Row(fields, "f:1"), codec)
    tree = encoded if isinstance(encoded, Tree) else encoded[0]
    controls = set(codec.tokenizer.all_special_ids)
    answered = 0 if isinstance(objective, ProcessReward) else len(tree.branches)
    ids = [*tree.prompt, *(token for branch in tree.branches for token in branch.ids)]
    assert sum(token in controls for token in ids) == (meant or answered)
    assert SPELLS in codec.tokenizer.decode(ids)
    assert not codec.noted
    codec = codec_of(template)
    objective.encode(Row(fields, "f:1"), codec)
    assert [list(origins) for what, origins in codec.noted.items() if "control tokens" in what] == [["f:1"]]


@pytest.mark.parametrize("many", [0, 70_000])
def test_characters_that_no_text_has_alone_stand_for_them_whatever_their_number(many):
    codec = codec_of(CHATML, "text")
    codec.tokenizer.add_tokens([f"word{place}" for place in range(many)])  # as in vocabularies of 150,000
    codec.tokenizer.add_special_tokens({"additional_special_tokens": ["<|late|>"]})
    text = "of <|late|> and \U000f0003 \U0010fffd"
    tree = codec.conversation([USER, {**ANSWER, "content": text}], "f:1")
    assert codec.tokenizer.convert_tokens_to_ids("<|late|>") not in tree.branches[0].ids
    assert said(codec, tree).startswith("of <|late|> and ")
    own = " \U000f0003 \U0010fffd"  # a text's own characters for private use
    assert codec.continuation(own) == codec.tokenizer(own, add_special_tokens=False)["input_ids"]


# A9: flags of a turn


@pytest.mark.parametrize("flag", [{"weight": 0}, {"loss": False}, {"trainable": False}, {"train": 0}])
@pytest.mark.parametrize("names", [("role", "content"), ("from", "value")])
def test_a_turn_that_is_flagged_is_not_trained(flag, names):
    turns = [("user", "q"), ("assistant", "bad"), ("user", "again"), ("assistant", "good")]
    messages = [dict(zip(names, turn, strict=True)) for turn in turns]
    messages[1] |= flag
    messages[3] |= {"weight": 1, "loss": None}
    source = listed({("messages" if names[0] == "role" else "conversations"): messages})
    codec = codec_of(CHATML)
    tree = encode(source, SFT(), codec, 64).trees[0]
    assert said(codec, tree) == "good<|im_end|>"
    assert "bad" in all_of(codec, tree)


@pytest.mark.parametrize(
    ("messages", "supervise", "told"),
    [
        ([USER, {**ANSWER, "weight": 0}], "assistant", "with flags that no turn is to be trained"),
        ([USER, ANSWER, USER, {**ANSWER, "train": False}], "last", "with flags that no turn is to be"),
        ([USER, {**ANSWER, "weight": 0}, USER, ANSWER], "all", "supervise=all trains every token"),
        (
            [USER, {**ANSWER, "weight": 0.5}],
            "assistant",
            "message 2: weight must be true or false .* got 0.5",
        ),
        ([USER, {**ANSWER, "loss": "no"}], "assistant", "message 2: loss must be true or false .* got 'no'"),
        (
            [USER, {**ANSWER, "wieght": 0}],
            "assistant",
            "message 2: unknown key 'wieght': did you mean 'weight'",
        ),
    ],
)
def test_flags_that_cannot_be_followed_are_refused(messages, supervise, told):
    with pytest.raises(DataError, match=told):
        codec_of(CHATML).trees(messages, "f:1", supervise)


def test_keys_of_messages_that_nothing_reads_are_counted():
    source = listed(*[{"messages": [USER, {**ANSWER, "date": "today", "name": "Bo", "id": 5}]}] * 2)
    told = encode(source, SFT(), codec_of(CHATML), 64).summary()
    assert "noted: 2 with 'date' in their messages, which nothing reads (f:1, f:2)" in told
    assert "2 with 'name' in" in told
    assert "'id'" not in told
    assert "noted" not in encode(source, SFT(), codec_of(CHATML + "{# date name #}"), 64).summary()


# A10, A11: what a row says is rendered, or the row is refused and counted


CUTS = CHATML.replace("m.content", "m.content[:8]")
NOBODY = KNOWN.replace("'system', ", "")
IN_TEXT = {**ANSWER, "content": "<think>hm</think>two"}
DEVELOPER, THOUGHT = {"role": "developer", "content": "be brief"}, {**ANSWER, "reasoning_content": "hm"}
BESIDE = [USER, {"role": "assistant", "content": "wait", "tool_calls": [CALL]}]


@pytest.mark.parametrize(
    ("template", "messages", "what"),
    [
        (CHATML, [USER, THOUGHT], "a thought"),
        (CHATML, [USER, {**ANSWER, "thinking": "t"}, USER, ANSWER], "a thought"),
        (EITHER, [*BESIDE, {"role": "tool", "content": "5"}, ANSWER], "a text of 'assistant'"),
        (CHATML, [USER, {"role": "assistant", "content": "t", "tool_calls": [CALL]}], "a call"),
        (NOBODY, [{"role": "system", "content": "s"}, USER, ANSWER], "a text of 'system'"),
        # What it says can be found elsewhere by chance.
        (KNOWN.replace("'tool'", "'x'"), [USER, *BESIDE[1:], {"role": "tool", "content": "e"}, ANSWER], "a "),
        (NOBODY, [{"role": "system", "content": "user"}, USER, ANSWER], "a text of 'system'"),
        (CUTS, [USER, {**ANSWER, "content": "a long answer"}], "a text of 'assistant'"),
        (CUTS, [{**USER, "content": "a long question"}, ANSWER], "a text of 'user'"),
        (FORGETS, [{**USER, "content": "what does </think> end?"}, ANSWER], "a text of 'user'"),
        (FORGETS.replace("and loop.last", "and false"), [USER, IN_TEXT], "a thought"),
    ],
)  # fmt: skip
def test_what_the_template_leaves_out_is_refused(template, messages, what):
    with pytest.raises(UnusableRowError, match=f"f:1: with {what}.* that the chat template leaves out"):
        codec_of(template).trees(messages, "f:1")


def test_a_mixed_run_goes_on_without_what_the_template_leaves_out():
    source = listed({"messages": [USER, ANSWER]}, {"messages": [USER, THOUGHT]}, {"messages": [USER, ANSWER]})
    assert (
        "dropped: 1 with a thought that the chat template leaves out; model.chat_template takes another (f:2)"
        in (encode(source, SFT(), codec_of(CHATML), 64).summary())
    )
    with pytest.raises(UnusableRowError, match="f:2: with a thought"):
        encode(source, SFT(), codec_of(CHATML), 64, unusable="refuse")


def test_a_pair_that_differs_in_a_thought_is_not_called_equal():
    row = Row(
        {"prompt": [USER], "chosen": [THOUGHT], "rejected": [{**THOUGHT, "reasoning_content": "x"}]}, "f:1"
    )
    with pytest.raises(UnusableRowError, match="with a thought that the chat template leaves out"):
        DPO().encode(row, codec_of(CHATML))
    chosen, rejected = DPO().encode(row, codec_of(FORGETS)).branches
    assert chosen != rejected


@pytest.mark.parametrize(
    ("role", "meant"),
    [("human", "user"), ("gpt", "assistant"), ("bot", "assistant"), ("Model ", "assistant"),
     ("developer", "system"), ("tool_response", "tool"), ("observation", "tool"), ("function", "tool")],
)  # fmt: skip
def test_roles_have_synonyms(role, meant):
    talk = [USER, ANSWER, {"role": role, "content": "three"}, ANSWER]
    if meant == "assistant":
        talk = [USER, talk[2]]
    elif meant == "system":
        talk = [talk[2], USER, ANSWER]
    codec, mapped = codec_of(KNOWN), [{**m, "role": meant if m["role"] == role else m["role"]} for m in talk]
    assert codec.trees(talk, "f:1") == codec.trees(mapped, "f:1")
    assert "three" in all_of(codec, codec.conversation(talk, "f:1"))


def test_a_template_that_knows_a_role_by_another_name_gets_it():
    codec = codec_of(CHATML.replace("{{ m.role }}", "{{ 'developer' if m.role == 'developer' else m.role }}"))
    assert "<|im_start|>developer\nbe brief" in all_of(
        codec, codec.conversation([DEVELOPER, USER, ANSWER], "f:1")
    )


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": "", "function_call": {"name": "add", "arguments": '{"a": "three"}'}},
        {"role": "assistant", "content": None, "tool_calls": json.dumps([CALL])},
        {"role": "tool_call", "content": json.dumps(CALL["function"])},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
    ],
)
def test_calls_come_in_many_forms(turn):
    codec = codec_of(CALLS.replace("ARGUMENTS", "c.function.arguments | tojson"))
    plain = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert codec.conversation([USER, turn], "f:1") == codec.conversation(plain, "f:1")
    assert said(codec, codec.conversation(plain, "f:1")) == 'add({"a": "three"})<|im_end|>'


# B6: arguments as a mapping or as text, whichever the template writes


@pytest.mark.parametrize(
    "wanted", ["c.function.arguments | tojson", "'' + c.function.arguments", "c.function.arguments"]
)
@pytest.mark.parametrize("given", [{"a": "three"}, '{"a": "three"}'])
def test_arguments_are_written_as_json_however_the_template_takes_them(wanted, given):
    codec = codec_of(CALLS.replace("ARGUMENTS", wanted))
    call = {"type": "function", "function": {"name": "add", "arguments": given}}
    tree = codec.conversation([USER, {"role": "assistant", "content": "", "tool_calls": [call]}], "f:1")
    assert said(codec, tree) == 'add({"a": "three"})<|im_end|>'


# B5: a tree for each turn where the template forgets thoughts


THINKS = [
    USER,
    {"role": "assistant", "content": "<think>hm</think>two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four", "reasoning_content": "so"},
]


def test_a_turn_has_a_tree_of_its_own_where_earlier_thoughts_are_forgotten():
    codec = codec_of(FORGETS)
    first, second = codec.trees(THINKS, "f:1")
    assert said(codec, first) == "<think>\nhm\n</think>\n\ntwo<|im_end|>"
    assert said(codec, second) == "<think>\nso\n</think>\n\nfour<|im_end|>"
    # As at inference: the prompt is what a model is given there.
    for tree, turn in ((first, 1), (second, 3)):
        prompt = codec.tokenizer.apply_chat_template(
            THINKS[:turn], tokenize=False, add_generation_prompt=True
        )
        assert codec.tokenizer.decode(tree.prompt) == prompt
        assert list(tree.prompt) == codec.prompt_ids(THINKS[:turn])
    assert codec.trees(THINKS, "f:1", "each") == [first, second]
    assert codec.trees(THINKS, "f:1", "last") == [second]
    assert codec.pairs(THINKS[:1], THINKS[1:], "f:1") == [first, second]
    with pytest.raises(UnusableRowError, match="with a thought that the chat template leaves out"):
        codec.trees(THINKS, "f:1", "all")


@pytest.mark.parametrize("end", ["", "<|im_end|>"])
def test_turns_that_the_template_ends_in_the_last_place_alone_have_a_tree_each(end):
    # GLM's turns end in nothing, gpt-oss' last one in a token of its own: the others' ends were untrained.
    last = f"{{% if loop.last and m.role == 'assistant' %}}{end}{{% endif %}}"
    template = TURN + "[{{ m.role }}]{{ m.content }}" + last + "{% endfor %}"
    codec = codec_of(template + "{% if add_generation_prompt %}[assistant]{% endif %}")
    talk = [USER, ANSWER, {**USER, "content": "three"}, {**ANSWER, "content": "four"}]
    trees = codec.trees(talk, "f:1")
    assert [said(codec, tree) for tree in trees] == [
        f"two{end or '<|im_end|>'}",
        f"four{end or '<|im_end|>'}",
    ]
    assert codec.tokenizer.decode(trees[1].prompt) == "[user]one[assistant]two[user]three[assistant]"
    assert trees == codec.trees(talk, "f:1", "each")
    assert len(codec.trees(talk, "f:1", "all")) == 1


def test_trees_of_turns_are_counted_and_answered_once_a_row():
    codec = codec_of(FORGETS)
    data = encode(listed({"messages": THINKS}, {"messages": [USER, ANSWER]}), SFT(), codec, 64)
    assert len(data) == 3
    assert (
        "noted: 1 with a tree for each turn, as the chat template rewrites earlier turns (f:1)"
        in data.summary()
    )
    assert data.rows[0] is data.rows[1]
    assert len(Evaluator.prompted(SimpleNamespace(held_out=data))) == 2


def test_each_makes_the_trees_of_all_where_prefixes_hold():
    codec, talk = codec_of(CHATML), [USER, ANSWER, USER, {**ANSWER, "content": "four"}]
    together, apart = codec.conversation(talk, "f:1"), codec.trees(talk, "f:1", "each")
    assert [list(tree.prompt) for tree in apart] == [codec.prompt_ids(talk[:1]), codec.prompt_ids(talk[:3])]
    assert "".join(said(codec, tree) for tree in apart) == said(codec, together)
    assert codec.trees(talk, "f:1") == [together]


# A12, A13, B7, B8, B9


def test_earlier_rounds_of_an_instruction_are_part_of_the_prompt():
    fields = {
        "instruction": "now",
        "input": "",
        "output": "yes",
        "history": [["first", "one"], ["then", "two"]],
    }
    for history in (fields["history"], json.dumps(fields["history"])):
        row = Row({**fields, "history": history}, "f:1")
        assert [m["content"] for m in laid_out(row, listed(), True).fields["prompt"]] == [
            "first", "one", "then", "two", "now"]  # fmt: skip
        assert laid_out(row, listed(), False).fields["prompt"] == "first\n\none\n\nthen\n\ntwo\n\nnow\n\n"
    for wrong in (["a", "b"], [["a"]], {"a": "b"}, [[1, 2]]):
        with pytest.raises(DataError, match=r"f:1: history must be a list of \[question, answer\]"):
            laid_out(Row({**fields, "history": wrong}, "f:1"), listed(), True)


def test_an_empty_list_of_tools_is_none():
    codec = codec_of("{% if tools is not none %}You may call:\n{% endif %}" + CHATML)
    assert codec.conversation([USER, ANSWER], "f:1", tools=[]) == codec.conversation([USER, ANSWER], "f:1")
    assert codec.prompt_ids([USER], tools=[]) == codec.prompt_ids([USER])


def test_text_parts_are_joined_and_images_refused_by_name():
    codec = codec_of(FORGETS)
    parts = [{"type": "text", "text": "tw"}, {"type": "text", "text": "o"}]
    assert codec.trees([USER, {**ANSWER, "content": parts}], "f:1") == codec.trees([USER, ANSWER], "f:1")
    thought = [{"type": "thinking", "thinking": "hm"}, *parts]
    assert codec.trees([USER, {**ANSWER, "content": thought}], "f:1") == codec.trees([USER, THOUGHT], "f:1")
    for kind in ("image", "image_url", "input_audio"):
        with pytest.raises(DataError, match=f"f:1: .*message 1: a part of its content is of type '{kind}'"):
            codec.prompt_ids([{"role": "user", "content": [{"type": kind, kind: "x"}]}], "f:1")


@pytest.mark.parametrize("column", ["messages", "conversations", "pair", "prompt"])
def test_messages_may_be_json_text(column):
    talk = [USER, ANSWER]
    fields = {
        "messages": {"messages": json.dumps(talk)},
        "conversations": {"conversations": json.dumps([{"from": "human", "value": "one"}, ANSWER])},
        "pair": {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])},
        "prompt": {"prompt": json.dumps([USER]), "completion": [ANSWER]},
    }[column]
    codec = codec_of(CHATML)
    assert list(encode(listed(fields), SFT(), codec, 64).trees) == [codec.conversation(talk, "f:1")]


def test_a_text_that_looks_like_json_stays_text():
    codec = codec_of(CHATML)
    text = '["role" is a word] of'
    assert codec.tokenizer.decode(codec.pair(text, "x", "f:1").prompt) == text


def test_a_system_turn_can_be_folded_into_the_users():
    system = {"role": "system", "content": "be brief"}
    with pytest.raises(DataError, match=r"refuses the messages: .*; model.system=fold puts the system turn"):
        codec_of(NO_SYSTEM + CHATML).conversation([system, USER, ANSWER], "f:1")
    codec = codec_of(FOLD + NO_SYSTEM + CHATML)
    folded = codec.conversation([{**USER, "content": "be brief\n\none"}, ANSWER], "f:1")
    for role in ("system", "developer"):
        assert codec.conversation([{**system, "role": role}, USER, ANSWER], "f:1") == folded
    assert codec.conversation([USER, ANSWER], "f:1") == codec_of(CHATML).conversation([USER, ANSWER], "f:1")


@pytest.mark.parametrize(
    ("fields", "prompt", "completion"),
    [
        ({"messages": [USER, ANSWER, USER, ANSWER]}, [USER, ANSWER, USER], [ANSWER]),
        ({"messages": [USER, {**ANSWER, "role": "gpt"}]}, [USER], [{**ANSWER, "role": "gpt"}]),
        ({"messages": [USER, ANSWER, USER]}, [USER, ANSWER, USER], None),
        ({"prompt": "a", "completion": "b"}, "a", "b"),
    ],
)
def test_the_prompt_of_a_conversation_is_what_stands_before_its_answer(fields, prompt, completion):
    row = asked(Row(fields, "f:1"))
    assert (row.fields["prompt"], row.fields.get("completion")) == (prompt, completion)


@pytest.mark.parametrize("template", [CHATML, FORGETS])
@pytest.mark.parametrize(
    "answer",
    [ANSWER, {**ANSWER, "content": "<think>\nhm\n</think>\n\ntwo"}, {**ANSWER, "reasoning_content": "hm"}],
)
def test_an_answer_is_right_by_what_it_says_behind_its_thoughts(template, answer):
    # Qwen3's template writes an empty thought before every answer: none that was learned by heart was right.
    codec, source = codec_of(template), listed()
    row = asked(Row({"messages": [USER, answer]}, "f:1"))
    if "reasoning_content" not in answer or template == FORGETS:
        learned = codec.text(codec.conversation([USER, answer], "f:1").branches[0].ids)
        assert source.verify(row, learned) == 1.0
    assert source.verify(row, "<think>\nwell, two\n</think>\n\n two\n") == 1.0
    assert source.verify(row, "two") == 1.0
    assert source.verify(row, "<think>\ntwo\n</think>\n\nthree") == 0.0


def test_how_a_call_is_spelled_is_known_to_nobody():
    called = {"messages": [USER, {**ANSWER, "content": "", "tool_calls": [CALL]}]}
    assert listed().verify(asked(Row(called, "f:1")), "add(three)") is None


@pytest.mark.parametrize(
    "fields", [{"text": "a"}, {"messages": [ANSWER]}, {"messages": []}, {"messages": "a"}]
)
def test_what_has_no_prompt_is_not_asked(fields):
    assert asked(Row(fields, "f:1")) is None


@pytest.mark.parametrize(
    "empty",
    [
        {"prompt": "a", "completion": " "},
        {"prompt": [USER], "completion": [{**ANSWER, "content": ""}]},
        {"messages": [USER, {**ANSWER, "content": "\n"}]},
        {"messages": [USER]},
        {"messages": [ANSWER]},
        {"text": ""},
    ],
)
def test_a_row_with_nothing_to_learn_from_is_dropped_and_counted(empty):
    full = {"prompt": "a", "completion": "b"} if empty.get("prompt") == "a" else {"messages": [USER, ANSWER]}
    full = {"text": "a b"} if "text" in empty else full
    data = encode(listed(full, empty, full), SFT(), codec_of(CHATML), 64)
    assert len(data) == 2
    assert sum(data.dropped.values()) == 1


@pytest.mark.parametrize("seed", range(30))
def test_random_conversations_are_rendered_whole(seed):
    """Whatever the texts are, what is encoded is what the template writes, up to the last turn's end."""
    chance = random.Random(seed)
    words = ["one", " two", "3\n", "<x>", "ü", "\n\n", "i", "<|im_end|>", "</s>", "e", "user"]
    talk = [
        {"role": role, "content": "a" + "".join(chance.choices(words, k=4)) + "."}
        for role in ["system"] * chance.randint(0, 1) + ["user", "assistant"] * chance.randint(1, 3)
    ]
    codec = codec_of(CHATML)
    shown = codec.tokenizer.apply_chat_template(talk, tokenize=False).removesuffix("\n")
    tree = codec.conversation(talk, "f:1")
    assert list(tree.prompt + tree.branches[0].ids) == codec.tokenizer(shown)["input_ids"]
    answers = [m["content"] + "<|im_end|>" for m in talk if m["role"] == "assistant"]
    assert said(codec, tree) == "".join(answers)


def test_a_call_without_arguments_is_written_where_they_are_added_to_a_text():
    codec = codec_of(CALLS.replace("{{ ARGUMENTS }}", "{{ c.function.name + ':' + c.function.arguments }}"))
    call = {"type": "function", "function": {"name": "now", "arguments": {}}}
    tree = codec.conversation([USER, {**ANSWER, "content": "", "tool_calls": [call]}], "f:1")
    assert said(codec, tree) == "now(now:{})<|im_end|>"


# D4: bounded time and memory


LOOPS = "{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GROWS = "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"


@pytest.mark.parametrize(
    ("loops", "told"),
    [
        (LOOPS, "longer than 2 seconds"),
        ("{{ 'a' * 9000000000 }}", "takes more than 4 GiB"),
        (GROWS, "takes"),
    ],
)  # fmt: skip
def test_a_template_that_loops_or_grows_is_one_line(monkeypatch, loops, told):
    monkeypatch.setattr("luthier.text.bounds.SECONDS", 2)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(DataError, match=f"f:1: the chat template .*{told}") as caught:
        codec_of(loops + CHATML).conversation([USER, ANSWER], "f:1")
    assert len(str(caught.value)) < 300
    assert resource.getrlimit(resource.RLIMIT_AS) == limit
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("name", ["text", "messages", "completion"])
def test_a_row_of_hundreds_of_megabytes_is_dropped_unread(name):
    long = "a" * 300_000_000
    full = {"text": "a b"} if name == "text" else {"messages": [USER, ANSWER]}
    fields = {
        "text": {"text": long},
        "messages": {"messages": [USER, {**ANSWER, "content": long}]},
        "completion": {"prompt": "a", "completion": long},
    }[name]
    told = encode(listed(full, fields), SFT(), codec_of(CHATML), 64).summary()
    assert "dropped: 1 with a text of more than 10,000,000 characters" in told
    with pytest.raises(UnusableRowError, match="f:2: with a text of more than"):
        encode(listed(full, fields), SFT(), codec_of(CHATML), 64, unusable="refuse")
