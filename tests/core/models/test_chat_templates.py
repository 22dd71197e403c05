"""Named chat templates: each supervises what the assistant says and its end, in one and several turns."""

import logging
import os
import subprocess
import sys

import pytest

from helpers import tiny_tokenizer
from luthier import Codec, ConfigError
from luthier.models.chat_templates import chat_template, known_templates

TALK = [
    {"role": "system", "content": "sys"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]
ENDS = {"llama3": "<|eot_id|>"}


def with_template(name: str, **tokens):
    tokenizer = tiny_tokenizer(add_bos=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<|start_header_id|>"]})
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = chat_template(name, tokenizer)
    return tokenizer


def spoken(tokenizer, tree) -> str:
    branch = tree.branches[0]
    mask = branch.scored or (True,) * len(branch.ids)
    return tokenizer.decode([i for i, scored in zip(branch.ids, mask, strict=True) if scored])


@pytest.mark.parametrize("name", ["chatml", "instruction", "llama3", "mistral", "zephyr"])
def test_what_is_supervised_is_what_the_assistant_says_and_its_end(name):
    tokenizer = with_template(name)
    tree = Codec(tokenizer).conversation(TALK, "f:1")
    end, space = ENDS.get(name, tokenizer.eos_token), " " if name == "mistral" else ""
    assert spoken(tokenizer, tree) == f"{space}two{end}{space}four{end}"
    whole = tree.prompt + tree.branches[0].ids
    assert whole.count(tokenizer.bos_token_id) == (name in ("llama3", "mistral"))
    shown = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert shown.startswith(tokenizer.decode(whole))
    assert "sys" in tokenizer.decode(tree.prompt)
    # At inference the prompt has the very ids that it had in training.
    assert Codec(tokenizer).prompt_ids(TALK[:2]) == list(tree.prompt)


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_tools_are_announced_called_and_answered(name):
    tokenizer = with_template(name)
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    talk = [
        *TALK[:2],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]
    tree = Codec(tokenizer).conversation(talk, "f:1", tools=[{"name": "add"}])
    prompt, said = tokenizer.decode(tree.prompt), spoken(tokenizer, tree)
    assert '{"name": "add"}' in prompt
    assert prompt.count("sys\n") == 1
    assert "It is 2." in said
    assert '"a": 1' in said
    assert "\\" not in said
    assert "None" not in said
    assert "tool\n2" not in said
    assert "ipython" not in said


@pytest.mark.parametrize("name", ["instruction", "mistral", "zephyr"])
def test_a_template_without_tools_refuses_them_in_one_line(name):
    tokenizer = with_template(name)
    talk = [TALK[1], {"role": "tool", "content": "2"}, TALK[2]]
    with pytest.raises(
        ValueError, match=rf"f:1: the chat template refuses .* {name} has no tool turns; choose"
    ):
        Codec(tokenizer).conversation(talk, "f:1")


def test_marks_that_are_no_tokens_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        chat_template("chatml", tiny_tokenizer())
        assert not caplog.messages
        chat_template("llama3", tiny_tokenizer())
    assert "llama3: <|end_header_id|> <|eot_id|> <|start_header_id|> is no token" in caplog.text


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    told = r"chatlm is no file .*, and unknown template 'chatlm': did you mean 'chatml'"
    with pytest.raises(ConfigError, match=told):
        chat_template("chatlm", tiny_tokenizer())
    (tmp_path / "bad.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"bad.jinja: cannot be read"):
        chat_template(str(tmp_path / "bad.jinja"), tiny_tokenizer())
    assert set(known_templates()) == {"chatml", "instruction", "llama3", "mistral", "zephyr"}


@pytest.mark.slow
def test_a_plugin_brings_templates_with_its_presets(strangers):
    modules = {
        "mine.py": "import luthier\n@luthier.hookimpl\ndef config_packages():\n    return 'mine_conf'\n",
        "mine_conf/__init__.py": "",
        "mine_conf/chat_templates/mine.jinja": "{{ messages[0].content }}",
        "mine_conf/chat_templates/chatml.jinja": "another",
    }
    strangers.install("mine", {"presets.mine": "mine"}, modules)
    code = "from luthier.models.chat_templates import known_templates as k; "
    code += "print(k()['mine'], k()['chatml'] == 'another')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(strangers.folder)},
    )  # fmt: skip
    assert done.stdout.split() == ["{{", "messages[0].content", "}}", "False"], done.stderr
