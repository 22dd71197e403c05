"""Text stays text: `run_dir=2026_11_27`, `data.path=1e3` and their kind (faults.md E)."""

import pytest

from luthier import ConfigError, compose
from luthier.config import opened, prepare

DATA = ["model.path=base", "data=jsonl", "data.path=rows.jsonl"]
TEXTS = [
    "2026_11_27", "1e3", "007", "1_000", "nan", "inf", "true", "yes", "on", "NULL",
    "/home/jürgen/daten.jsonl",
    "a b", "~/x", "a#b", "a:b", "$x", "[a]", "{a", "(a)", "it's", 'say "x"', "a,b",
    "😀", "a\\b", "a\\", "a=b",
    "", " x ", "%d", "@x", "&", "a;b", "'a' b", "glob(*)",
]  # fmt: skip


@pytest.mark.parametrize("text", [*TEXTS, "null"])
def test_an_option_that_is_text_takes_what_was_typed(text):
    config = compose("train", [*DATA, f"run_dir={text}", f"data.path={text}"])
    assert (config.run_dir, config.data.path) == (text, text)


@pytest.mark.parametrize("text", TEXTS)
def test_one_that_may_be_null_takes_text_too(text):
    assert compose("train", [*DATA, f"model.path={text}"]).model.path == text


def test_null_is_null_where_an_option_may_be():
    config = compose("train", [*DATA, "model.path=null", "model.chat_template=null", "max_steps=null"])
    assert (config.model.path, config.model.chat_template, config.max_steps) == (None, None, None)


@pytest.mark.parametrize(("typed", "text"), [("'1e3'", "1e3"), ('"a b"', "a b"), (r"'it\'s'", "it's")])
def test_quotes_of_ones_own_are_quotes(typed, text):
    assert compose("train", [*DATA, f"data.path={typed}"]).data.path == text


@pytest.mark.parametrize(
    ("typed", "texts"),
    [
        ("[1.10,010,no]", ["1.10", "010", "no"]),
        ("[1e3]", ["1e3"]),
        ("[a, 2026_11_27 ,'b']", ["a", "2026_11_27", "b"]),
        ("['a,1.10,b',1.10]", ["a,1.10,b", "1.10"]),
        ('["1.10",null]', ["1.10", "null"]),
        ("[]", []),
    ],
)
def test_what_a_list_of_texts_holds_is_text(typed, texts):
    assert list(compose("train", [*DATA, f"model.new_tokens={typed}"]).model.new_tokens) == texts


def test_an_interpolation_stays_one():
    config = compose("train", [*DATA, "run_dir=2026_11_27", "data.path=${run_dir}/ü.jsonl"])
    assert config.data.path == "2026_11_27/ü.jsonl"
    with pytest.raises(ConfigError, match=r"data\.path"):
        compose("train", [*DATA, "data.path=${"])


def test_other_options_are_read_as_ever():
    more = ["batch_size=1_000", "adapter.targets=[q_proj,v_proj]", "optimiser.lr=1e-3", "shuffle=no_way"]
    config = compose("train", [*DATA, *more[:3], "adapter.rank_pattern.q_proj=4"])
    assert (config.batch_size, config.optimiser.lr) == (1000, 1e-3)
    assert list(config.adapter.targets) == ["q_proj", "v_proj"]
    assert config.adapter.rank_pattern == {"q_proj": 4}
    with pytest.raises(ConfigError, match="shuffle"):
        compose("train", [*DATA, more[3]])


def test_stages_and_columns_are_text():
    line = "train recipe=quickstart run_dir=2026_11_27"
    config = compose("train", [*DATA, f"stages.one={line}", "data.columns.prompt=007"])
    assert config.stages == {"one": line}
    assert config.data.columns == {"prompt": "007"}


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("1e3,jürgen", "'1e3','jürgen'"),
        ("a,b", "a,b"),
        ("'a,b',c", "'a,b',c"),
        ("${now:%Y,%m},x", "${now:%Y,%m},x"),
        ("choice(a,b)", "choice(a,b)"),
        ("it's,2_0", r"'it\'s','2_0'"),
    ],
)
def test_a_comma_stands_between_the_runs_of_a_multirun(typed, read):
    prepare()
    assert opened("train", [f"data.path={typed}"], several=True) == [f"data.path={read}"]
