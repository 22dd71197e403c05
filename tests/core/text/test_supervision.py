"""What is supervised under templates of the styles that models come with."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers import tiny_tokenizer
from luthier import Codec, DataError, UnusableRowError
from luthier.testing.models import TEXTS

TURN = "{% for m in messages %}"
STYLES = {
    "chatml": TURN + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "bos": "{{ bos_token }}" + TURN + "[{{ m.role }}]\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}",
    "inst": "{{ bos_token }}" + TURN + "{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
    "system in user": TURN + "{% if m.role == 'user' %}<|im_start|>user\n{% if messages[0].role == 'system' "
    "and loop.index0 == 1 %}{{ messages[0].content }}\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>model\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}",
}  # fmt: skip
THINKING = (
    TURN + "<|im_start|>{{ m.role }}\n{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]
THOUGHT = [
    TALK[1],
    {"role": "assistant", "content": "<think>hm</think>two"},
    TALK[3],
    {"role": "assistant", "content": "<think>so</think>four"},
]


def codec_of(template: str | None) -> Codec:
    tokenizer = tiny_tokenizer(add_bos=True)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = template
    return Codec(tokenizer)


def parts(codec: Codec, tree) -> tuple[str, str]:
    """The supervised text of a tree, and the rest of its branch."""
    branch = tree.branches[0]
    mask = branch.scored or (True,) * len(branch.ids)
    return tuple(
        codec.tokenizer.decode([i for i, scored in zip(branch.ids, mask, strict=True) if scored == wanted])
        for wanted in (True, False)
    )


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("supervise", "said"), [("assistant", ["two", "four"]), ("last", ["four"])])
def test_assistant_bytes_are_supervised_bytes(style, supervise, said):
    # users.md rows 5 to 7: masked answers, a doubled BOS, an end that is never trained where it also pads.
    codec = codec_of(STYLES[style])
    tree = codec.conversation(TALK, "f:1", supervise)
    space = " " if style == "inst" else ""
    assert parts(codec, tree)[0] == "".join(f"{space}{text}<|im_end|>" for text in said)
    whole = list(tree.prompt + tree.branches[0].ids)
    assert whole.count(codec.tokenizer.bos_token_id) == (style in ("bos", "inst"))
    assert whole[-1] == codec.tokenizer.eos_token_id
    shown = codec.tokenizer.apply_chat_template(TALK, tokenize=False)
    assert shown.rstrip("\n") == codec.tokenizer.decode(whole)
    turn = 2 if supervise == "assistant" else 4
    assert codec.prompt_ids(TALK[:turn]) == list(tree.prompt)


@pytest.mark.parametrize("style", STYLES)
def test_all_is_every_token_but_the_first(style):
    codec = codec_of(STYLES[style])
    tree = codec.conversation(TALK, "f:1", "all")
    assert len(tree.prompt) == 1
    assert tree.branches[0].scored is None
    shown = codec.tokenizer.apply_chat_template(TALK, tokenize=False)
    assert (
        list(tree.prompt + tree.branches[0].ids)
        == codec.tokenizer(shown, add_special_tokens=False)["input_ids"]
    )


def test_a_template_that_forgets_earlier_thoughts_is_ambiguous_but_for_the_last_turn():
    codec = codec_of(THINKING)
    told = (
        r"f:1: the chat template renders what stands before turn 4 differently once turn 3 .*"
        r"|f:1: the chat template renders what stands before turn 4 differently once turn 4 "
        r"\(assistant: '<think>so</think>four'\) follows, 'assistant.*<think>hm.*' as 'assistant.*two.*', .*"
    )
    with pytest.raises(DataError, match=told) as caught:
        codec.conversation(THOUGHT, "f:1")
    assert "\n" not in str(caught.value)
    hidden = [THOUGHT[0], {**THOUGHT[1], "content": "<think>hm</think>\x1b[2J"}, *THOUGHT[2:]]
    with pytest.raises(DataError) as caught:
        codec.conversation(hidden, "f:1")
    assert "\x1b" not in str(caught.value)
    tree = codec.conversation(THOUGHT, "f:1", "last")
    assert parts(codec, tree)[0] == "<think>so</think>four<|im_end|>"
    assert "hm" not in codec.tokenizer.decode(tree.prompt)


def test_a_turn_that_begins_otherwise_than_its_prompt_has_no_tree_at_all():
    codec = codec_of(STYLES["chatml"].replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"))
    for supervise in ("assistant", "last"):
        with pytest.raises(UnusableRowError, match="are ambiguous; take another template"):
            codec.trees(TALK, "f:1", supervise)


def test_an_end_token_that_only_the_last_turn_has_makes_nothing_ambiguous():
    # Phi-3's: one end a turn, where generation stops, and the end of texts behind the last of them.
    codec = codec_of(
        TURN + "[{{ m.role }}]{{ m.content }}<|im_start|>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% else %}{{ eos_token }}{% endif %}"
    )
    tree = codec.conversation(TALK, "f:1")
    assert parts(codec, tree)[0] == "two<|im_start|>four<|im_start|>"
    shown = codec.tokenizer.apply_chat_template(TALK, tokenize=False)
    assert codec.tokenizer.decode(tree.prompt + tree.branches[0].ids) == shown.removesuffix("\n<|im_end|>")


@pytest.mark.parametrize("supervise", ["assistant", "last"])
def test_an_answer_that_the_template_leaves_out_is_no_end_token_alone(supervise):
    # users.md row 3: training looks healthy, and nothing but the end is learned.
    codec = codec_of(TURN + "[{{ m.role }}]{{ m.text }}<|im_end|>{% endfor %}")
    codec.tokenizer.chat_template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    with pytest.raises(DataError, match=r"f:1: with a text of '.*' that the chat template leaves out"):
        codec.conversation(TALK, "f:1", supervise)
    # An answer that is a special token is one.
    codec.tokenizer.chat_template = STYLES["chatml"]
    label = [TALK[1], {"role": "assistant", "content": "<|startoftext|>"}]
    assert parts(codec, codec.conversation(label, "f:1"))[0] == "<|startoftext|><|im_end|>"


def test_functions_that_the_template_leaves_out_are_refused():
    # users.md row 5: on tool turns the call vanishes, and its end is trained.
    call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
    talk = [TALK[1], {"role": "assistant", "content": "hm", "tool_calls": [call]}]
    codec = codec_of(STYLES["chatml"])
    for supervise in ("assistant", "all"):
        with pytest.raises(UnusableRowError, match="f:1: with a call that the chat template leaves out"):
            codec.conversation(talk, "f:1", supervise)
        with pytest.raises(UnusableRowError, match="f:1: with the function 'add' that the chat template"):
            codec.conversation(TALK, "f:1", supervise, tools=[{"name": "add"}])


def test_an_empty_list_of_calls_is_none():
    # Llama 3.1's template asks whether there is one, and refuses all but one call.
    codec = codec_of(STYLES["chatml"].replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls }}"))
    talk = [TALK[1], {"role": "assistant", "content": "two", "tool_calls": []}]
    assert parts(codec, codec.conversation(talk, "f:1"))[0] == "two<|im_end|>"


def test_a_conversation_that_the_assistant_opens_has_a_last_turn():
    codec = codec_of(STYLES["chatml"])
    assert parts(codec, codec.conversation(TALK[2:], "f:1", "last"))[0] == "four<|im_end|>"


def test_a_template_that_writes_the_date_makes_the_same_rows_every_day():
    # Llama 3.2's: a run that is resumed tomorrow must find the rows it began with.
    codec = codec_of("{{ strftime_now('%d %b %Y') }}\n" + STYLES["chatml"])
    assert codec.tokenizer.decode(codec.conversation(TALK, "f:1").prompt).startswith("26 Jul 2024\n")


def test_a_completion_of_several_messages_supervises_the_assistants():
    codec = codec_of(STYLES["chatml"])
    tail = [
        {"role": "assistant", "content": "call"},
        {"role": "tool", "content": "result"},
        {"role": "assistant", "content": "done"},
    ]
    said, silent = parts(codec, codec.pair(TALK[:4], tail, "f:1"))
    assert said == "call<|im_end|>done<|im_end|>"
    assert "result" in silent
    assert parts(codec, codec.pair(TALK[:4], tail, "f:1", "last"))[0] == "done<|im_end|>"
    # Turns of the prompt are context, also the assistant's.
    assert codec.tokenizer.decode(codec.pair(TALK[:4], tail, "f:1").prompt).count("two") == 1


def test_an_end_that_the_template_leaves_out_is_trained_at_the_end():
    codec = codec_of(TURN + "[{{ m.role }}]{{ m.content }}\n{% endfor %}")
    codec.tokenizer.chat_template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    assert parts(codec, codec.conversation(TALK, "f:1"))[0] == "two\nfour\n<|im_end|>"


def test_a_text_is_supervised_from_its_second_token_to_its_end():
    codec = codec_of(None)
    tree = codec.document("one two", "f:1")
    assert tree.prompt == (codec.tokenizer.bos_token_id,)
    assert codec.tokenizer.decode(tree.branches[0].ids) == "one two<|im_end|>"
    twice = codec.document("<|startoftext|>one<|im_end|>two", "f:1")
    assert (
        codec.tokenizer.decode(twice.prompt + twice.branches[0].ids)
        == "<|startoftext|>one<|im_end|>two<|im_end|>"
    )
    pair = codec.pair("one", " two", "f:1", "all")
    assert codec.tokenizer.decode(pair.prompt + pair.branches[0].ids) == "<|startoftext|>one two<|im_end|>"
    assert len(pair.prompt) == 1


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda codec: codec.document("", "f:1"), "f:1: with an empty text"),
        (lambda codec: codec.document(5, "f:1"), "f:1: text must be a text .* got int"),
        (
            lambda codec: codec.conversation([*TALK[:2], {"role": "assistant", "content": " "}], "f:1"),
            "f:1: with an empty assistant turn",
        ),
        (
            lambda codec: codec.conversation([TALK[1], {"role": "assistant", "tool_calls": 5}], "f:1"),
            "f:1: messages, message 2: tool_calls must be a list of calls, got int",
        ),
        (
            lambda codec: codec.conversation([TALK[1], {"role": "assistant", "tool_calls": "x"}], "f:1"),
            "f:1: messages, message 2: calls: not JSON",
        ),
        (lambda codec: codec.pair(TALK[:2], TALK[3:], "f:1"), "the completion must begin with .* got 'user'"),
        (
            lambda codec: codec.pair(TALK[:2], [{"role": "assistant", "content": ""}], "f:1"),
            "f:1: with an empty completion",
        ),
        (lambda codec: codec.pair(b"ab", "c", "f:1"), "f:1: prompt must be text .* got bytes"),
    ],
)
def test_what_has_nothing_to_supervise_is_named(call, told):
    with pytest.raises(DataError, match=told):
        call(codec_of(STYLES["chatml"]))


def test_what_continues_a_text_gets_no_space_that_begins_one():
    # SentencePiece's tokenizers put a space before every text, also before one that is a piece of another.
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=200, special_tokens=["</s>"], show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    assert tokenizer.convert_ids_to_tokens(tokenizer("is")["input_ids"])[0].startswith("▁")
    branch = Codec(tokenizer).pair("The answer ", "is", "f:1").branches[0]
    assert "".join(tokenizer.convert_ids_to_tokens(list(branch.ids))) == "is</s>"
