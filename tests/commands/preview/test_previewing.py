"""`preview`: the examples of a training run, without its model, on the terminal and as a page."""

import html
import io
import json
import re
import shutil

import pytest
from rich.console import Console

from helpers import BOS, END, TEMPLATE, tiny_llama, tiny_tokenizer, write_rows
from luthier import Branch, ConfigError, ModelError, Tree, compose
from luthier.commands.cli import dispatch
from luthier.errors import LuthierError
from luthier.registry import command
from luthier_plugins.commands.preview import preview
from luthier_plugins.commands.preview.page import show, write_page
from luthier_plugins.commands.preview.previewing import Example, PreviewResult, findings

PAIRS = """
    from dataclasses import dataclass
    from typing import ClassVar
    from luthier import Branch, Objective, Tree, hookimpl

    @dataclass(frozen=True)
    class Pairs(Objective):
        '''Two completions of a prompt.'''
        branch_names: ClassVar[tuple[str, ...]] = ("chosen", "rejected")

        def encode(self, row, codec):
            good = codec.pair(row.fields["prompt"], row.fields["chosen"], row.origin)
            bad = codec.pair(row.fields["prompt"], row.fields["rejected"], row.origin)
            return Tree(good.prompt, good.branches + bad.branches, row.origin, {"margin": 0.5})

        def loss(self, policy, pack):
            raise AssertionError("nothing is trained")

    @hookimpl
    def register_objectives(register):
        register("pairs", Pairs)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A base whose weights would not load, and rows."""
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).config.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"no weights at all")
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(6)]
    write_rows(tmp_path / "rows.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def previewed(*more: str) -> PreviewResult:
    return preview(compose("preview", ["model.path=base", "data=jsonl", "data.path=rows.jsonl", *more]))


def shown(result, **options) -> str:
    console = Console(file=io.StringIO(), width=100, **options)
    show(result, console)
    return console.file.getvalue()


def ids_of(text):
    return tuple(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])


def test_the_first_examples_are_shown_without_loading_weights(folder, capsys):
    # users.md rows 4 and 36: loss on every token, or another template, that nobody saw before the run.
    result = previewed()
    assert [one.origin for one in result.examples] == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]
    assert result.rows == 6
    text = capsys.readouterr().out
    assert f"0 + 1 =\n\ncompletion  2 tokens, 2 trained (100 %)\n⟦ 1{END}⟧" in text
    assert "prompt  5 tokens, none trained" in text
    assert f"data      {result.summary}" in text
    assert f"end token '{END}' is trained in 6 of 6 completions" in text
    assert f"begin token '{BOS}': 6 rows start with none" in text
    assert (folder / "preview.html").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["base", "preview.html", "rows.jsonl"]


@pytest.mark.slow
def test_examples_are_chosen_by_number_by_row_or_at_random(folder):
    def numbers(*more):
        return [one.number for one in previewed("html=null", *more).examples]

    assert numbers("examples=2") == [1, 2]
    assert numbers("examples=99") == [1, 2, 3, 4, 5, 6]
    assert numbers("rows=[5,2]") == [5, 2]
    assert numbers("pick_seed=1") == numbers("pick_seed=1")
    assert len({tuple(numbers(f"pick_seed={seed}")) for seed in range(5)}) > 1
    assert not (folder / "preview.html").exists()


def test_a_training_command_becomes_its_preview_by_the_verb(folder, capsys):
    (folder / "held.jsonl").write_text(json.dumps({"prompt": "0 + 1 =", "completion": " 1"}) + "\n")
    arguments = [
        "model.path=base", "data=jsonl", "data.path=rows.jsonl", "data@eval_data=jsonl",
        "eval_data.path=held.jsonl", "adapter.rank=4", "optimiser.lr=1e-3", "batch_size=2", "run_dir=runs/x",
        "trackers.progress.enabled=false", "max_length=64",
    ]  # fmt: skip
    compose("train", arguments)
    assert dispatch(["preview", *arguments]) == 0
    text = capsys.readouterr().out
    assert "dropped: 1 also in eval_data" in text
    assert "held out  1 row ·" in text
    assert "rows.jsonl:2" in text
    assert "rows.jsonl:1\n" not in text
    assert not (folder / "runs").exists()


def test_pairs_of_a_strangers_objective_are_shown_with_their_names(folder, strangers, monkeypatch, capsys):
    strangers.install("luthier-pairs", {"objective.pairs": "pairs_plugin"}, {"pairs_plugin.py": PAIRS})
    row = {"prompt": "a ->", "chosen": " b", "rejected": " c d"}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with strangers.in_catalogue():
        result = previewed("objective=pairs")
    assert [part.label for part in result.examples[0].branches] == ["chosen", "rejected"]
    text = capsys.readouterr().out
    assert "row 1 · rows.jsonl:1 · margin 0.5" in text
    assert f"⟦ b{END}⟧" in text
    assert f"⟦ c d{END}⟧" in text


@pytest.fixture
def paired():
    """A tree made by hand: two completions, one half masked, with values."""
    bad = ids_of(f" no<b>{END}")
    tree = Tree(
        ids_of("<script>alert(1)</script>\n&"),
        (Branch(ids_of(f" yes{END}")), Branch(bad, (False, *[True] * (len(bad) - 1)))),
        'pairs<i>"7',
        {"margin": 0.25, "label": 1.0},
    )
    tokenizer = tiny_tokenizer()
    example = Example.of(tree, tokenizer, number=7)
    return PreviewResult("<em>model</em>", (example,), 1, "1 rows", findings=findings(tokenizer, [tree], 1))


def test_a_paired_tree_has_both_completions_and_its_values(paired):
    text = shown(paired)
    assert 'row 7 · pairs<i>"7 · margin 0.25 · label 1' in text
    assert "<script>alert(1)</script>↵\n&" in text
    assert f"completion 1  {len(ids_of(f' yes{END}'))} tokens" in text
    first = tiny_tokenizer().decode(ids_of(" no<b>")[:1])
    assert f"\n{first}⟦" in text
    assert "legend    ⟦trained⟧" in text


def test_colour_marks_what_is_trained_on_a_terminal_unless_it_is_switched_off(paired, monkeypatch):
    text = shown(paired, force_terminal=True, color_system="standard")
    assert "\x1b[30;42m yes\x1b[0m" in text.replace("\x1b[0m\x1b[30;42m", "")
    assert "⟦" not in text
    monkeypatch.setenv("NO_COLOR", "1")
    assert "⟦" in shown(paired, force_terminal=True)


def test_the_page_escapes_every_text_and_needs_nothing_else(paired, tmp_path):
    write_page(paired, tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    body = page.partition("<body>")[2]
    for tag in ("<script", "<i>", "<em>", "<b>\n", "src=", "href=", "http:", "https:", "@import", "url("):
        assert tag not in page
    text = html.unescape(re.sub(r"<[^>]*>", "", body))
    assert "<script>alert(1)</script>↵\n&" in text
    assert 'pairs<i>"7 · margin 0.25 · label 1' in text
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page


def test_a_token_of_the_page_tells_its_position_id_and_whether_it_is_trained(paired, tmp_path):
    write_page(paired, tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    prompt, end = ids_of("<script>alert(1)</script>\n&"), ids_of(END)[0]
    assert f'data-tip="token 0 · id {prompt[0]} · not trained"' in page
    place = len(prompt) + len(ids_of(" yes"))
    assert f'class="t s" data-tip="token {place} · id {end} · trained · special">{html.escape(END)}' in page


def test_of_a_long_prompt_the_terminal_shows_the_beginning_and_the_end():
    tokenizer = tiny_tokenizer()
    tree = Tree(ids_of("first" + "." * 2000 + "last"), (Branch(ids_of("a")),))
    text = shown(PreviewResult("m", (Example.of(tree, tokenizer),), 1, "1 rows"))
    assert "first" in text
    assert "last" in text
    left_out = int(re.search(r"… ([\d,]+) tokens are only on the page", text)[1].replace(",", ""))
    assert left_out == len(tree.prompt) - 400
    assert text.count(".") < 500


def test_an_end_token_that_is_not_trained_and_a_doubled_begin_token_are_told():
    tokenizer = tiny_tokenizer()
    prompt = ids_of(f"{BOS}{BOS}a")
    trees = [Tree(prompt, (Branch(ids_of(f"b{END}")),)), Tree(ids_of("a"), (Branch(ids_of("b.")),))]
    begins, ends = findings(tokenizer, trees, 5)
    assert begins.wrong
    assert "1 row starts with none, 1 row starts with two" in begins.text
    assert ends.wrong
    assert "is trained in 1 of 2 completions; others train '.' last" in ends.text
    assert ends.text.endswith("(the first 2 rows)")
    # What a template writes behind the end is trained with supervise=all; the end is trained all the same.
    for end in (END, f"{END}\n"):
        tree = Tree(ids_of("a"), (Branch(ids_of(f"b{end}")),))
        assert not any(one.wrong for one in findings(tokenizer, [tree], 1))


def test_preview_takes_the_groups_that_train_takes():
    assert command("preview").defaults == command("train").defaults


def test_a_template_that_doubles_the_begin_token_is_seen_in_a_run(folder):
    shutil.rmtree(folder / "base")
    tokenizer = tiny_tokenizer(add_bos=True)
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + TEMPLATE
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained("base")
    tokenizer.save_pretrained("base")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (folder / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    begins = previewed("html=null").findings[0]
    assert begins.wrong
    assert "1 row starts with two" in begins.text


@pytest.mark.parametrize(
    ("more", "error", "told"),
    [
        (["rows=[7]"], ConfigError, "there is no row 7; 6 rows are used"),
        (["rows=[0]"], ConfigError, "there is no row 0"),
        (["examples=0"], ConfigError, "examples=0 must be positive"),
        (["html=nowhere/x.html"], ConfigError, "html=nowhere/x.html cannot be written: No such file"),
        (["max_length=9999"], ConfigError, "max_length=9999 is more than the model's context, 256"),
        (["data@eval_data=jsonl", "eval_data.path=rows.jsonl"], ConfigError, "nothing is left to train on"),
        (["model.path=./nowhere"], ModelError, "model.path=./nowhere is not there"),
    ],
)
def test_a_mistake_is_one_line(folder, more, error, told):
    with pytest.raises(error, match=told) as caught:
        previewed(*more)
    assert "\n" not in str(caught.value)


def test_there_is_nothing_to_run_many_times(folder):
    with pytest.raises(LuthierError, match="leave out -m"):
        dispatch(["preview", "-m", "model.path=base", "data=jsonl", "data.path=rows.jsonl"])


def test_its_help_names_its_own_options_first(capsys):
    assert dispatch(["preview", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.index("  examples ") < text.index("options of train") < text.index("  batch_size ")
    assert text.count("  examples ") == 1
