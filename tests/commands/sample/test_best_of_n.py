"""`sample` with reward models: what is scored, chosen, drawn, written; and what was stopped goes on."""

import json

import pytest
import torch

from helpers import save_tiny, tiny_gpt2, tiny_llama, tiny_tokenizer, write_rows
from luthier import Codec, ConfigError, DataError, ModelPolicy, compose
from luthier.contracts.data_source import DataSource
from luthier.policy.generation import Answer, Decoding, answers
from luthier_plugins.commands.sample import sample, sampling
from luthier_plugins.commands.sample.journal import Journal

pytestmark = pytest.mark.slow

ROWS = [{"prompt": f"{n} + {n} =", "completion": f" {2 * n}"} for n in range(5)]
SAID = ["2", "two words", "and now three", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("best")
    save_tiny(path / "base")
    write_rows(path / "rows.jsonl", ROWS)
    return path


@pytest.fixture
def said(monkeypatch):
    """Every prompt is answered alike."""

    def told(policy, codec, prompts, decoding):
        for place in range(len(prompts)):
            yield place, [Answer(text, True, (0,) * len(text.split())) for text in SAID]

    monkeypatch.setattr(sampling, "answers", told)


def given(folder, *more, rows=None):
    asked = ["data=jsonl", f"data.path={rows or folder / 'rows.jsonl'}"]
    return compose("sample", [f"model.path={folder}/base", "model.dtype=float32", "n=4", "max_new_tokens=4",
                              *asked, *more])  # fmt: skip


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


LONG = ("reward_model=[length]", "reward_models.length.per_token=-1")


def test_candidates_have_every_score_and_the_chosen_one_is_marked(folder, tmp_path, said):
    more = (
        "reward_model=[length,verifier]",
        "reward_models.length.per_token=-1",
        "reward_models.length.weight=2",
    )
    sample(given(folder, *more, f"out={tmp_path}/o.jsonl"))
    lines = written(tmp_path / "o.jsonl")[4:8]  # of 1 + 1
    assert [line["score"] for line in lines] == [3.0, 4.0, 6.0, 3.0]
    assert [line["scores"] for line in lines] == [
        {"length": 1.0, "verifier": 1.0}, {"length": 2.0, "verifier": 0.0},
        {"length": 3.0, "verifier": 0.0}, {"length": 1.0, "verifier": 1.0},
    ]  # fmt: skip
    assert [line["chosen"] for line in lines] == [False, False, True, False]
    assert [line["right"] for line in lines] == [True, False, False, True]
    assert [line["tokens"] for line in lines] == [1, 2, 3, 1]


def test_rows_are_what_was_chosen(folder, tmp_path, said):
    for name, more in {"best": LONG, "vote": ("selector=majority",)}.items():
        sample(given(folder, *more, "write=rows", f"out={tmp_path}/{name}.jsonl"))
    assert [line["completion"] for line in written(tmp_path / "best.jsonl")] == ["and now three"] * 5
    assert [line["completion"] for line in written(tmp_path / "vote.jsonl")] == ["2"] * 5


def test_pairs_are_the_best_against_the_worst(folder, tmp_path, said):
    sample(given(folder, *LONG, "write=pairs", "pairs_each=2", f"out={tmp_path}/o.jsonl"))
    found = [(line["chosen"], line["rejected"]) for line in written(tmp_path / "o.jsonl")]
    assert found == [("and now three", "2")] * 5  # "two words" is left, and is not worse than itself
    sample(given(folder, *LONG, "write=pairs", "min_score=3", f"out={tmp_path}/p.jsonl"))
    assert len(written(tmp_path / "p.jsonl")) == 5
    sample(given(folder, *LONG, "write=pairs", "min_score=4", f"out={tmp_path}/q.jsonl"))
    assert written(tmp_path / "q.jsonl") == []


def test_the_curve_of_score_and_right_answers_is_shown_and_drawn(folder, tmp_path, said, capsys):
    picture = tmp_path / "curve.png"
    result = sample(given(folder, *LONG, f"out={tmp_path}/o.jsonl", f"picture={picture}"))
    points = {point.drawn: point for point in result.curve}
    assert list(points) == [1, 2, 4]
    assert [points[n].score for n in points] == pytest.approx([7 / 4, 14 / 6, 3.0])
    # One prompt of five is answered right by two of the four: no choice among all of them takes one.
    assert [points[n].right for n in points] == pytest.approx([0.1, 1 / 30, 0.0])
    assert points[4].divergence == pytest.approx(0.636, abs=1e-3)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    shown = capsys.readouterr().out
    assert "0.64 nats" in shown
    assert "chosen among" in shown


def test_equal_scores_are_no_signal(folder, tmp_path, said, caplog):
    sample(given(folder, "reward_model=[missing_end]", f"out={tmp_path}/o.jsonl"))
    assert "there is no signal" in caplog.text


def test_prompts_of_the_command_line_are_shown(folder, said, capsys):
    config = compose(
        "sample", [f"model.path={folder}/base", "prompt=['one and one?', 'another']", "n=4", *LONG]
    )
    result = sample(config)
    shown = capsys.readouterr().out
    assert (result.prompts, result.out) == (2, None)
    assert shown.count("and now three") == 2
    assert "3 · score 3.000 · chosen" in shown
    assert shown.index("one and one?") < shown.index("another")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "expected prompts: either data=SOURCE or prompt="),
        (["data=jsonl", "data.path=rows.jsonl", "prompt=one"], "expected prompts: either"),
        (["data=jsonl", "data.path=rows.jsonl"], "out is missing"),
        (["prompt=one", "write=pairs"], "out is missing"),
        (["prompt=one", "picture=x.png", "n=1"], "draws score against N, and n=1"),
        (["prompt=''"], "must be a text with something in it"),
        (["prompt=one", "selector=best"], "best_of_n"),
    ],
)
def test_commands_that_mean_nothing_are_refused(folder, overrides, message):
    with pytest.raises(ConfigError, match=message):
        sample(compose("sample", [f"model.path={folder}/base", *overrides]))


def test_a_prompt_that_leaves_no_room_is_named(folder, tmp_path):
    write_rows(tmp_path / "long.jsonl", [ROWS[0], {"prompt": "one two " * 200, "completion": "x"}])
    with pytest.raises(
        DataError, match=r"long.jsonl:2: the prompt has .* tokens, and the model's context is"
    ):
        sample(given(folder, f"out={tmp_path}/o.jsonl", rows=tmp_path / "long.jsonl"))
    assert list(tmp_path.glob("o.jsonl*")) == []


def test_a_verifier_that_raises_is_named_and_counts_as_zero_only_if_told_so(
    folder, tmp_path, said, monkeypatch
):
    def fail(self, row, answer):
        raise ZeroDivisionError("no such sum")

    monkeypatch.setattr(DataSource, "verify", fail)
    with pytest.raises(DataError, match=r"rows.jsonl:1: verifying failed \(ZeroDivisionError: no such sum\)"):
        sample(given(folder, f"out={tmp_path}/o.jsonl"))
    zero = ("reward_model=[verifier]", "reward_models.verifier.on_error=zero")
    sample(given(folder, *zero, f"out={tmp_path}/p.jsonl"))
    assert {line["score"] for line in written(tmp_path / "p.jsonl")} == {0.0}


class StoppedError(Exception):
    """Stands for what stops a run."""


@pytest.mark.parametrize("whole", [1, 2])
def test_what_was_stopped_goes_on_and_ends_in_the_same_bytes(folder, tmp_path, monkeypatch, whole):
    monkeypatch.setattr(sampling, "TOGETHER", 1)
    options = ("batch_size=8", *LONG)  # two prompts a part: three parts
    expected = sample(given(folder, *options, f"out={tmp_path}/whole.jsonl"))
    add = Journal.add

    def stop(self, lines, state):
        if self.parts == whole:
            with self._draft.open("a") as file:
                file.write('{"half a li')
            raise StoppedError
        add(self, lines, state)

    monkeypatch.setattr(Journal, "add", stop)
    with pytest.raises(StoppedError):
        sample(given(folder, *options, f"out={tmp_path}/o.jsonl"))
    monkeypatch.setattr(Journal, "add", add)
    with pytest.raises(ConfigError, match="of a command with other options"):
        sample(given(folder, *options, "seed=1", f"out={tmp_path}/o.jsonl"))
    found = sample(given(folder, *options, f"out={tmp_path}/o.jsonl"))
    assert (tmp_path / "o.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert found.curve == expected.curve
    assert (found.answers, found.tokens, found.right) == (20, expected.tokens, expected.right)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.jsonl", "whole.jsonl"]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_prompt_runs_once_for_all_its_answers(make):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    policy, codec = ModelPolicy(make(vocab_size=len(tokenizer)).eval()), Codec(tokenizer)
    prompts = [[5, 9, 30, 41, 12], [8, 7], [6]]
    alone = dict(answers(policy, codec, prompts, Decoding(6, 1)))
    seen = []
    policy.model.get_input_embeddings().register_forward_hook(lambda _, ids, out: seen.append(ids[0].shape))
    together = dict(answers(policy, codec, prompts, Decoding(6, 12, n=4)))
    assert seen[0] == torch.Size([3, 4])  # three prompts, all but their last token, and once each
    assert all(shape == torch.Size([12, 1]) for shape in seen[1:])
    assert together == {place: own * 4 for place, own in alone.items()}
