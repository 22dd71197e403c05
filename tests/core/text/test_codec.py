"""Rendering and masks: what is supervised, and that training sees the ids inference sees."""

import pytest

from helpers import tiny_tokenizer
from luthier import Codec, DataError

CHAT = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


@pytest.fixture(scope="module")
def codec():
    return Codec(tiny_tokenizer())


def decoded(codec, ids):
    return codec.tokenizer.decode(ids)


def test_a_text_pair_is_its_two_texts_and_the_end_token(codec):
    tree = codec.pair("2 + 2 =", " 4", "x:1")
    assert decoded(codec, tree.prompt) == "2 + 2 ="
    assert list(tree.branches[0].ids) == [*codec.tokenizer(" 4")["input_ids"], codec.tokenizer.eos_token_id]
    assert tree.scored_tokens == len(tree.branches[0].ids)


def test_the_end_token_is_trained_once_even_where_it_pads(codec):
    # users.md row 7: with pad=eos a mask by id hides the end token and the model never stops.
    tree = codec.pair(CHAT[:1], CHAT[1:2], "x:1")
    assert list(tree.branches[0].ids).count(codec.tokenizer.eos_token_id) == 1
    assert tree.branches[0].ids[-1] == codec.tokenizer.eos_token_id
    assert tree.branches[0].scored is None or all(tree.branches[0].scored)


def test_training_and_inference_see_the_same_prompt_ids(codec):
    # users.md rows 6 and 36: another template, or a doubled BOS, on one of the two sides.
    tree = codec.pair(CHAT[:1], CHAT[1:2], "x:1")
    rendered = codec.tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert list(tree.prompt) == codec.prompt_ids(CHAT[:1])
    assert list(tree.prompt) == codec.tokenizer(rendered, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_that_adds_bos_adds_it_once():
    codec = Codec(tiny_tokenizer(add_bos=True))
    bos = codec.tokenizer.bos_token_id
    assert codec.pair("ab", "c", "x:1").prompt.count(bos) == 1
    assert codec.pair("ab", "c", "x:1").branches[0].ids.count(bos) == 0
    assert codec.pair("", "c", "x:1").prompt == (bos,)


def test_every_assistant_turn_is_supervised_and_nothing_else(codec):
    # users.md rows 3 to 5: all-zero masks, loss on everything, masked assistant text.
    tree = codec.conversation(CHAT, "x:1")
    branch = tree.branches[0]
    spoken = decoded(codec, [i for i, scored in zip(branch.ids, branch.scored, strict=True) if scored])
    silent = decoded(codec, [i for i, scored in zip(branch.ids, branch.scored, strict=True) if not scored])
    assert spoken == "two<|im_end|>four<|im_end|>"
    assert "three" in silent
    assert "two" not in silent
    whole = codec.tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert whole.startswith(decoded(codec, tree.prompt + branch.ids))


def test_a_template_that_rewrites_earlier_turns_is_an_error_that_names_the_turn(codec):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}{% if not loop.last %} (old){% endif %}] {{ m.content }}\n"
        "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    with pytest.raises(
        DataError, match=r"rows.jsonl:3: the chat template renders .* before turn 2 differently"
    ):
        Codec(tokenizer).conversation(CHAT, "rows.jsonl:3")


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda codec: codec.conversation(CHAT[:1], "f:1"), "f:1: without an assistant turn to learn from"),
        (lambda codec: codec.pair("a", CHAT[1:2], "f:2"), "f:2: prompt and completion must both be"),
        (lambda codec: codec.pair("", "a", "f:3"), "f:3: the prompt is empty"),
        (lambda codec: codec.pair(None, "a", "f:4"), "f:4: prompt must be text or a list .* got NoneType"),
        (lambda codec: codec.pair("a", 5, "f:5"), "f:5: completion must be text or a list .* got int"),
        (lambda codec: codec.pair("a", " ", "f:6"), "f:6: with an empty completion"),
        (lambda codec: codec.conversation("hi", "f:7"), "f:7: messages must be a list .* got a text"),
        (lambda codec: codec.conversation([], "f:8"), "f:8: messages must be .* got an empty list"),
        (
            lambda codec: codec.conversation([{"role": "humn", "content": "q"}, *CHAT[1:]], "f:9"),
            "f:9: messages, message 1: unknown role 'humn': did you mean 'human'",
        ),
        (
            lambda codec: codec.conversation([CHAT[0], {"role": "judge", "content": "a"}], "f:9"),
            "f:9: messages, message 2: unknown role 'judge': known: ai, assistant",
        ),
        (
            lambda codec: codec.conversation(CHAT[1:], "f:9"),
            "f:9: with an assistant turn that nothing stands before",
        ),
        (lambda codec: codec.conversation(["hi"], "f:9"), "f:9: messages, message 1: expected {'role'"),
        (
            lambda codec: codec.conversation([*CHAT[:1], {"role": "assistant"}], "f:10"),
            "f:10: messages, message 2: content must be text, got NoneType",
        ),
    ],
)
def test_malformed_rows_are_named(codec, call, told):
    with pytest.raises(DataError, match=told):
        call(codec)


def test_messages_without_a_template_say_how_to_give_one():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(
        DataError, match=r"f:1: messages need a chat template .* set model.chat_template=FILE"
    ):
        Codec(tokenizer).conversation(CHAT, "f:1")
