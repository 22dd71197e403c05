"""Pairs: rows in every layout, what says nothing, what a person should know, and the shared numbers."""

import json
import math

import pytest
import torch

from helpers import tiny_llama, tiny_tokenizer
from luthier import Codec, DataError, ModelPolicy, Pack, Row, UnusableRowError
from luthier.data.data import encode
from luthier.policy.references import References, keys_of
from luthier_plugins.data_sources.jsonl import JsonLines
from luthier_plugins.objectives.dpo import DPO
from luthier_plugins.objectives.simpo import SimPO
from luthier_toolkits.preference import log1mexp
from luthier_toolkits.preference.pair_findings import pair_findings
from luthier_toolkits.preference.pair_rows import pair_tree, split_pair

USER = {"role": "user", "content": "What is 2 + 2?"}


def said(content):
    return {"role": "assistant", "content": content}


def row(**fields):
    return Row(fields, "rows.jsonl:3")


def texts(tree):
    tokenizer = tiny_tokenizer()
    return [tokenizer.decode(ids) for ids in (tree.prompt, *(branch.ids for branch in tree.branches))]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [USER], "chosen": [said("4")], "rejected": [said("5")]},
        {"prompt": [USER], "chosen": "4", "rejected": "5"},
        {"prompt": [USER], "chosen": [USER, said("4")], "rejected": [USER, said("5")]},
        {"chosen": [USER, said("4")], "rejected": [USER, said("5")]},
        {"prompt": "What is 2 + 2?", "chosen": [USER, said("4")], "rejected": [USER, said("5")]},
    ],
    ids=[
        "messages",
        "texts after messages",
        "prompt repeated",
        "conversations",
        "prompt as text beside them",
    ],
)
def test_every_layout_of_messages_is_the_same_tree(fields):
    tree = pair_tree(row(**fields), Codec(tiny_tokenizer()))
    assert texts(tree) == texts(pair_tree(row(prompt=[USER], chosen=[said("4")], rejected=[said("5")]),
                                          Codec(tiny_tokenizer())))  # fmt: skip
    prompt, chosen, rejected = texts(tree)
    assert "2 + 2" in prompt
    assert "4" in chosen
    assert "5" not in chosen
    assert "5" in rejected
    assert tree.origin == "rows.jsonl:3"


def test_conversations_share_what_they_share():
    more = [USER, said("Four."), {"role": "user", "content": "Are you sure?"}]
    prompt, sides = split_pair(row(chosen=[*more, said("Yes.")], rejected=[*more, said("No.")]))
    assert prompt == more
    assert sides == ([said("Yes.")], [said("No.")])


def test_conversations_that_part_at_a_question_share_what_is_before_the_answer_to_it():
    asked = {"role": "user", "content": "Sure?"}
    prompt, sides = split_pair(row(chosen=[USER, said("4"), asked, said("Yes")], rejected=[USER, said("4")]))
    assert prompt == [USER]
    assert sides == ([said("4"), asked, said("Yes")], [said("4")])


def test_texts_without_a_prompt_part_before_a_space():
    start = "\n\nHuman: Hello\n\nAssistant:"
    prompt, sides = split_pair(row(chosen=f"{start} I'm here", rejected=f"{start} Ignore it"))
    assert prompt == start
    assert sides == (" I'm here", " Ignore it")


def test_a_side_that_continues_the_other_leaves_both_something():
    prompt, sides = split_pair(row(chosen="Q: why A: because of that", rejected="Q: why A: because"))
    assert prompt == "Q: why A:"
    assert sides == (" because of that", " because")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"prompt": "a", "chosen": "b"}, "has prompt, chosen; a pair needs 'chosen' and 'rejected'"),
        ({"chosen": "yes", "rejected": "no"}, "begin with different words"),
        ({"chosen": [said("4")], "rejected": [said("5")]}, "begin with different turns"),
        ({"prompt": "a", "chosen": "b", "rejected": [said("c")]}, "both be text or both be messages"),
        (
            {"prompt": 5, "chosen": "a b", "rejected": "a c"},
            "prompt must be text or a list of messages, got int",
        ),
        ({"prompt": "a", "chosen": 3, "rejected": 4}, "chosen must be text or a list of messages, got int"),
        ({"prompt": "a", "chosen": said("4"), "rejected": said("5")}, "chosen must be .* got dict"),
        ({"prompt": [USER], "chosen": ["4"], "rejected": ["5"]}, "chosen, message 1: expected"),
        (
            {"prompt": "zzz", "chosen": [USER, said("4")], "rejected": [USER, said("5")]},
            "the prompt is none of the turns that chosen and rejected share",
        ),
    ],
)
def test_rows_that_are_no_pairs_are_named(fields, told):
    with pytest.raises(DataError, match=told) as error:
        pair_tree(row(**fields), Codec(tiny_tokenizer()))
    assert str(error.value).startswith("rows.jsonl:3: ")


def test_texts_that_repeat_the_prompt_are_taken_without_it():
    asked = "one two three four"
    prompt, sides = split_pair(row(prompt=asked, chosen=f"{asked} cc", rejected=f"{asked} dd"))
    assert (prompt, sides) == (asked, (" cc", " dd"))
    assert split_pair(row(prompt=asked, chosen=f"{asked} cc", rejected="dd"))[1] == (f"{asked} cc", "dd")


def test_answers_that_begin_like_a_short_prompt_are_whole():
    assert split_pair(row(prompt="Hello", chosen="Hello! How", rejected="Hello there"))[1][0] == "Hello! How"


@pytest.mark.parametrize("fields", [{}, {"prompt": [USER]}], ids=["without a prompt", "with a prompt"])
def test_a_conversation_without_turns_is_unusable(fields):
    with pytest.raises(UnusableRowError, match="with an empty side: 'chosen'"):
        pair_tree(row(chosen=[], rejected=[USER, said("5")], **fields), Codec(tiny_tokenizer()))


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_an_empty_side_is_unusable_and_says_which(empty):
    with pytest.raises(UnusableRowError, match=r"rows.jsonl:3: with an empty side: 'rejected'"):
        pair_tree(row(prompt="a", chosen="b", rejected=empty), Codec(tiny_tokenizer()))


def data_of(tmp_path, rows, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return encode(JsonLines(path=str(path)), DPO(), Codec(tiny_tokenizer()), 100, **options)


PAIRS = [
    {"prompt": "one", "chosen": " two", "rejected": " nine"},
    {"prompt": "two", "chosen": " three", "rejected": " three"},
    {"prompt": "three", "chosen": " four", "rejected": ""},
    {"prompt": "four", "chosen": " five", "rejected": " five"},
]


def test_what_teaches_nothing_is_counted_and_named(tmp_path):
    data = data_of(tmp_path, PAIRS)
    assert len(data) == 1
    assert data.dropped == {"with chosen equal to rejected": 2, "with an empty side: 'rejected'": 1}
    line = data.lines("data")[1]
    assert "2 with chosen equal to rejected (" in line
    assert "rows.jsonl:2, " in line
    assert "rows.jsonl:4)" in line


@pytest.mark.parametrize(
    ("first", "told"), [(1, "rows.jsonl:1: with chosen equal"), (2, "with an empty side")]
)
def test_what_teaches_nothing_can_be_refused(tmp_path, first, told):
    with pytest.raises(UnusableRowError, match=told):
        data_of(tmp_path, PAIRS[first:], unusable="refuse")


def test_sides_that_are_equal_once_they_are_cut_are_left_out(tmp_path):
    rows = [{"prompt": "a", "chosen": " b c d e one", "rejected": " b c d e two"}, PAIRS[0]]
    tokens = len(tiny_tokenizer()("a b c d e").input_ids)
    data = data_of(tmp_path, rows)
    assert len(data) == 2
    path = tmp_path / "rows.jsonl"
    cut = encode(JsonLines(path=str(path)), DPO(), Codec(tiny_tokenizer()), tokens, "truncate_right")
    assert cut.dropped["with chosen equal to rejected"] == 1


def trees_of(*pairs):
    codec = Codec(tiny_tokenizer())
    return [
        pair_tree(Row(dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)), f"row {number}"), codec)
        for number, pair in enumerate(pairs, 1)
    ]


def test_contradictions_are_found_and_named():
    trees = trees_of(("a", " b", " c"), ("a", " c", " b"), ("x", " b", " c"), ("a", " b", " c"))
    finding = pair_findings(trees)[0]
    assert finding.refusable
    assert finding.text == "2 contradictions between rows: row 1 and row 2, row 2 and row 4"
    assert not any(one.refusable for one in pair_findings(trees[1:3]))


def test_length_bias_is_said():
    long, short = " one two three four five", " six"
    biased = pair_findings(trees_of(("a", long, short), ("b", long, short), ("c", short, long)))[-1].text
    assert biased.startswith("chosen is the longer side in 67% of the pairs (")
    assert biased.endswith("taking the longer side is right in 67% of them")
    even = pair_findings(trees_of(("a", long, short), ("c", short, long)))[-1].text
    assert "taking the" not in even
    shorter = pair_findings(trees_of(("a", short, long), ("c", short, long)))[-1].text
    assert shorter.endswith("taking the shorter side is right in 100% of them")


def measured(objective, trees, shift=()):
    """The loss on a policy whose reference gives what it gives itself, less `shift` per branch."""
    policy = ModelPolicy(tiny_llama())
    pack = Pack.of(trees)
    with torch.no_grad():
        sums = policy.logprobs(pack).sums()
    keys = [key for tree in trees for key in keys_of(tree)]
    shifted = sums - torch.tensor(shift) if len(shift) else sums
    policy.references = References.of(dict(zip(keys, shifted.tolist(), strict=True)))
    return objective.loss(policy, pack), sums


def test_the_metrics_are_those_of_the_pairs():
    trees = trees_of(("a", " b c d", " e"), ("x y", " z", " one two"))
    loss, sums = measured(DPO(beta=0.5), trees, [2.0, 1.0, -3.0, 1.0])
    value = {name: float(total) / weight for name, (total, weight) in loss.metrics.items()}
    lengths = [len(branch.ids) for tree in trees for branch in tree.branches]
    assert value["margin"] == pytest.approx(0.5 * ((2 - 1) + (-3 - 1)) / 2, abs=1e-5)
    assert value["pair_accuracy"] == 0.5
    assert value["rewards/chosen"] == pytest.approx(0.5 * (2 - 3) / 2, abs=1e-5)
    assert value["rewards/rejected"] == pytest.approx(0.5, abs=1e-5)
    assert value["logprobs/chosen"] == pytest.approx(float(sums[0] + sums[2]) / 2, rel=1e-6)
    assert value["nll"] == pytest.approx(-float(sums[0] + sums[2]) / (lengths[0] + lengths[2]), rel=1e-6)
    assert value["length/chosen"] == (lengths[0] + lengths[2]) / 2
    # It prefers chosen of the first pair and rejected of the second.
    assert value["length/preferred"] == (lengths[0] + lengths[3]) / 2
    assert loss.weight == 2


def test_before_the_first_step_nothing_is_preferred():
    trees = trees_of(("a", " b c d", " e"))
    loss, _ = measured(DPO(), trees)
    assert loss.total.item() == pytest.approx(math.log(2), abs=1e-6)
    assert float(loss.metrics["pair_accuracy"][0]) == 0.5
    assert float(loss.metrics["length/preferred"][0]) == sum(len(b.ids) for b in trees[0].branches) / 2


def test_an_objective_without_a_reference_never_asks_for_one():
    policy = ModelPolicy(tiny_llama())
    loss = SimPO().loss(policy, Pack.of(trees_of(("a", " b", " c"))))
    assert torch.isfinite(loss.total)
    with pytest.raises(Exception, match="no reference was measured"):
        DPO().loss(policy, Pack.of(trees_of(("a", " b", " c"))))


@pytest.mark.parametrize("x", [-1e-12, -1e-4, -0.6931, -0.7, -3.0, -40.0])
def test_log1mexp_is_exact_where_the_plain_formula_is_not(x):
    exact = math.log(-math.expm1(x))
    assert float(log1mexp(torch.tensor(x, dtype=torch.float64))) == pytest.approx(exact, rel=1e-9)
    assert torch.isfinite(log1mexp(torch.zeros(())))
