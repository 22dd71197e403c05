"""`sample`: answers, what their source says of them, and what is written of it."""

import json
import re
import subprocess
import sys

import pytest

from helpers import save_tiny, write_rows
from luthier import ConfigError, DataError, compose, train
from luthier.policy.generation import Answer
from luthier_plugins.commands.sample import sample, sampling
from luthier_plugins.commands.sample.journal import Journal


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sampled")
    save_tiny(path / "base")
    rows = [
        {"prompt": "1 + 1 =", "completion": " 2"},
        {"prompt": "a longer one: 1 + 2 =", "completion": " 3"},
    ]
    write_rows(path / "rows.jsonl", rows)
    return path


def given(folder, out, *more):
    return compose("sample", [
        f"model.path={folder}/base", "model.dtype=float32", "data=jsonl", f"data.path={folder}/rows.jsonl",
        f"out={out}", "max_new_tokens=3", "n=4", *more,
    ])  # fmt: skip


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_prompt_gets_its_answers_and_the_seed_decides_them(folder, tmp_path):
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        result = sample(given(folder, tmp_path / f"{name}.jsonl", f"seed={seed}"))
        assert (result.prompts, result.answers, result.written) == (2, 8, 8)
    one, again, other = (written(tmp_path / f"{name}.jsonl") for name in ("one", "again", "other"))
    assert one == again
    assert [line["completion"] for line in one] != [line["completion"] for line in other]
    assert [line["prompt"] for line in one] == ["1 + 1 ="] * 4 + ["a longer one: 1 + 2 ="] * 4
    assert len({line["completion"] for line in one}) > 2
    assert {line["score"] for line in one} <= {0.0, 1.0}


def test_few_answers_at_a_time_are_as_many_in_all(folder, tmp_path):
    assert sample(given(folder, tmp_path / "rows.jsonl", "batch_size=1")).answers == 8


@pytest.fixture
def told(monkeypatch):
    """What the model answers: the first prompt twice right, twice wrong; the second always wrong."""
    said = {
        0: [Answer("2", True), Answer("2", False), Answer("5", True), Answer("2", True)],
        1: [Answer("9", True), Answer("", True), Answer("8", True), Answer("9", True)],
    }
    monkeypatch.setattr(sampling, "answers", lambda *_: iter(said.items()))
    return said


def test_a_pair_is_a_right_and_a_wrong_answer(folder, tmp_path, told):
    result = sample(given(folder, tmp_path / "pairs.jsonl", "write=pairs", "pairs_each=3"))
    assert written(tmp_path / "pairs.jsonl") == [
        {"prompt": "1 + 1 =", "chosen": "2", "rejected": "5", "answer": "2"}
    ]
    assert (result.right, result.solved, result.written) == (2, 1, 1)


def test_a_rows_own_completion_can_stand_in(folder, tmp_path, told):
    sample(given(folder, tmp_path / "pairs.jsonl", "write=pairs", "gold=true"))
    assert written(tmp_path / "pairs.jsonl")[1] == {
        "prompt": "a longer one: 1 + 2 =", "chosen": " 3", "rejected": "9", "answer": "3",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("write", "why"),
    [
        ("pairs", r"0 pairs in .*: no prompt has an answer that is good enough beside a worse one"),
        ("rows", r"0 rows in .*: no answer is good enough and came to an end"),
    ],
)
def test_that_nothing_is_written_has_a_reason(folder, tmp_path, monkeypatch, capsys, write, why):
    said = {place: [Answer("9", True), Answer("8", False)] for place in range(2)}
    monkeypatch.setattr(sampling, "answers", lambda *_: iter(said.items()))
    assert sample(given(folder, tmp_path / "out.jsonl", f"write={write}")).written == 0
    assert re.search(why, " ".join(capsys.readouterr().out.split()))


def test_right_answers_become_rows(folder, tmp_path, told):
    sample(given(folder, tmp_path / "out.jsonl", "write=rows"))
    assert written(tmp_path / "out.jsonl") == [{"prompt": "1 + 1 =", "completion": "2", "answer": "2"}]


def test_what_is_written_trains(folder, tmp_path, told):
    sample(given(folder, tmp_path / "pairs.jsonl", "write=pairs", "gold=true"))
    result = train(compose("train", [
        f"model.path={folder}/base", "model.dtype=float32", "data=jsonl", f"data.path={tmp_path}/pairs.jsonl",
        "objective=dpo", "max_steps=1", f"run_dir={tmp_path}/run", "tracker=[]",
    ]))  # fmt: skip
    assert result.steps == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("write=pair", "unknown write 'pair': did you mean 'pairs'"),
        ("n=0", "n=0 must be positive"),
        ("temperature=0", "temperature=0.0 must be positive"),
        ("top_p=1.5", r"top_p=1.5 must be in \(0, 1\]"),
    ],
)
def test_options_that_mean_nothing_are_refused(folder, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        sample(given(folder, tmp_path / "out.jsonl", override))


def test_a_file_that_is_there_is_not_written_over(folder, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine\n")
    with pytest.raises(ConfigError, match="is there already"):
        sample(given(folder, tmp_path / "out.jsonl"))
    assert (tmp_path / "out.jsonl").read_text() == "mine\n"


def test_a_file_that_is_being_written_is_left_to_who_writes_it(tmp_path):
    """Of two commands with one `out` the later one is refused, and takes nothing from the first."""
    out = tmp_path / "new" / "answers.jsonl"
    first = Journal(out, "one")
    first.add([{"a": 1}], {})
    for made in ("one", "another"):
        with pytest.raises(
            ConfigError, match=r"answers.jsonl is being written by a command that has not ended"
        ):
            Journal(out, made)
    first.add([{"a": 2}], {})
    first.close()
    assert out.read_text() == '{"a": 1}\n{"a": 2}\n'
    assert list(out.parent.iterdir()) == [out]
    with pytest.raises(ConfigError, match="is there already"):
        Journal(out, "one")
    assert list(out.parent.iterdir()) == [out]


def test_what_was_stopped_holds_nothing(tmp_path):
    """A killed command's lock ends with it; what it had written is gone on with."""
    out = tmp_path / "answers.jsonl"
    script = (
        "import os, pathlib, sys; from luthier_plugins.commands.sample.journal import Journal;"
        "j = Journal(pathlib.Path(sys.argv[1]), 'one'); j.add([{'a': 1}], {}); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(out)], check=False).returncode == -9
    again = Journal(out, "one")
    assert again.parts == 1
    again.close()
    assert list(tmp_path.iterdir()) == [out]


def test_rows_without_a_prompt_or_an_answer_are_named(folder, tmp_path, told):
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(DataError, match=r"texts.jsonl:1: has text; an answer needs 'prompt'"):
        sample(given(folder, tmp_path / "out.jsonl", f"data.path={tmp_path}/texts.jsonl"))
    (tmp_path / "open.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    with pytest.raises(
        DataError, match=r"open.jsonl:1: nothing says which answers are right: set write=candidates"
    ):
        sample(given(folder, tmp_path / "out.jsonl", f"data.path={tmp_path}/open.jsonl", "write=pairs"))
    assert not (tmp_path / "out.jsonl").exists()


def test_a_wrong_answer_that_was_cut_off_is_no_side_of_a_pair(folder, tmp_path, told):
    told[0] = [Answer("2", True), Answer("5 and", False), Answer(" 7", True), Answer("2", True)]
    sample(given(folder, tmp_path / "pairs.jsonl", "write=pairs"))
    assert [line["rejected"] for line in written(tmp_path / "pairs.jsonl")] == [" 7"]


def test_answers_are_written_as_they_continue_a_text_and_verified_without_the_space(folder, tmp_path, told):
    told[0] = [Answer(" 2\n", True)] * 4
    result = sample(given(folder, tmp_path / "out.jsonl", "write=rows"))
    assert [line["completion"] for line in written(tmp_path / "out.jsonl")] == [" 2\n"]
    assert result.right == 4
