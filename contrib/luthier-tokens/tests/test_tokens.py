"""`tokens`: counts by hand, its refusals, and Luthier's suite of commands."""

import json

import pytest

import luthier
from luthier import ConfigError, compose
from luthier.testing import CommandSuite, tiny_tokenizer
from luthier_tokens.tokens import Tokens


class TestTokens(CommandSuite):
    method = Tokens


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_tokenizer().save_pretrained("letters")
    rows = [{"prompt": "abc", "completion": "de"}, {"messages": [{"role": "user", "content": "fg"}]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_every_text_of_a_row_is_counted(folder, capsys):
    counts = luthier.tokens(compose("tokens", ["tokenizers=[letters]", "data=jsonl", "data.path=rows.jsonl"]))
    ids = tiny_tokenizer()(["abc", "de", "user", "fg"], add_special_tokens=False)["input_ids"]
    assert counts == {"letters": sum(map(len, ids))}
    assert f"{counts['letters']} tokens" in capsys.readouterr().out


def test_without_a_tokenizer_it_says_what_is_expected(folder):
    with pytest.raises(ConfigError, match="tokenizers: expected at least one"):
        compose("tokens", ["data=jsonl", "data.path=rows.jsonl"])
