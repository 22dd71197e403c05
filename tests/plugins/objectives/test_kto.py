"""KTO: labels from every kind of row, completions of other prompts, and the loss against a plain loop."""

import math

import pytest
import torch

from helpers import tiny_llama, tiny_tokenizer
from luthier import Codec, ConfigError, DataError, ModelPolicy, Pack, Row, Tree, UnusableRowError
from luthier.engine.auxiliary import with_auxiliary
from luthier.engine.pooling import pooled
from luthier.policy.references import References, keys_of
from luthier.system.processes import Processes
from luthier_plugins.objectives.kto.kto import KTO
from luthier_plugins.objectives.sft import SFT

ROWS = [
    {"prompt": "one", "completion": " two", "label": True},
    {"prompt": "three", "completion": " four five", "label": 0},
    {"prompt": "six", "completion": " seven eight nine", "label": 1},
    {"prompt": "ten", "completion": " x", "label": False},
]


def encoded(objective, rows):
    codec = Codec(tiny_tokenizer())
    found = [objective.encode(Row(row, f"row {number}"), codec) for number, row in enumerate(rows, 1)]
    return [tree for one in found for tree in (one if isinstance(one, list) else [one])]


def completed(objective, rows, seed=0):
    return list(objective.complete(encoded(objective, rows), torch.Generator().manual_seed(seed)))


def test_labels_may_be_truths_or_numbers():
    assert [tree.values["label"] for tree in encoded(KTO(), ROWS)] == [1, 0, 1, 0]


def test_ratings_become_labels_on_request():
    rows = [{"prompt": "a", "completion": " b", "rating": rating} for rating in (1, 3.5, 4)]
    assert [tree.values["label"] for tree in encoded(KTO(threshold=3.5), rows)] == [0, 1, 1]
    with pytest.raises(DataError, match="row 1: label must be true or false, got None"):
        encoded(KTO(), rows)
    with pytest.raises(DataError, match="row 1: rating must be a number"):
        encoded(KTO(threshold=1.0), [{"prompt": "a", "completion": " b", "rating": "good"}])
    with pytest.raises(DataError, match="row 1: rating must be a number"):
        encoded(KTO(threshold=1.0), [{"prompt": "a", "completion": " b", "rating": math.nan}])
    with pytest.raises(ConfigError, match="threshold=nan must be finite"):
        KTO(threshold=math.nan)
    with pytest.raises(ConfigError, match="set one of them"):
        KTO(threshold=1.0, unpair=True)


def test_a_pair_becomes_two_rows_on_request():
    pair = {"prompt": "a", "chosen": " b", "rejected": " c d"}
    good, bad = encoded(KTO(unpair=True), [pair])
    assert (good.values["label"], bad.values["label"]) == (1, 0)
    assert good.prompt == bad.prompt
    assert len(bad.branches) == 1
    assert len(bad.branches[0].ids) > len(good.branches[0].ids)
    with pytest.raises(DataError, match=r"objective\.unpair=true"):
        encoded(KTO(), [pair])


def test_every_row_gets_the_completion_of_another_prompt_and_each_is_used_once():
    pairs = [{"prompt": name, "chosen": f" {name} b", "rejected": f" {name} c"} for name in ("k", "l", "m")]
    trees = completed(KTO(unpair=True), pairs)
    own = {tree.branches[0].ids: tree.prompt for tree in trees}
    assert all(own[tree.branches[1].ids] != tree.prompt for tree in trees)
    assert len({tree.branches[1].ids for tree in trees}) == 6


def test_no_path_becomes_longer_than_the_longest_there_was():
    rows = [
        {"prompt": "a " * 30, "completion": " b", "label": True},
        {"prompt": "c", "completion": " d" * 30, "label": False},
    ]
    before, after = encoded(KTO(), rows), completed(KTO(), rows)
    longest = max(tree.tokens for tree in before)
    for tree in after:
        assert all(len(tree.prompt) + len(branch.ids) <= longest for branch in tree.branches)
        assert tree.branches[1].scored_places


@pytest.mark.parametrize("label", [True, False])
def test_one_label_alone_is_refused_in_training(label):
    trees = encoded(KTO(), [{**row, "label": label} for row in ROWS])
    with pytest.raises(DataError, match=rf"every row has label {label} \(row 1, row 2, row 3"):
        KTO().check(trees)
    KTO().check(encoded(KTO(), ROWS))
    assert len(list(KTO().complete(trees, torch.Generator()))) == 4, "held-out rows may be of one kind"


def test_a_pair_of_equal_sides_is_no_two_rows():
    with pytest.raises(UnusableRowError, match="row 1: with chosen equal to rejected"):
        encoded(KTO(unpair=True), [{"prompt": "a", "chosen": " b", "rejected": " b"}])


def test_a_completion_with_both_labels_is_found():
    rows = [*ROWS, {**ROWS[2], "label": False}, {**ROWS[0]}]
    (finding,) = KTO().findings(encoded(KTO(), rows))
    assert finding.refusable
    assert finding.text == "1 contradiction between rows: row 3 and row 5"
    assert KTO().findings(encoded(KTO(), ROWS)) == []


def test_only_desirable_completions_are_taught_by_what_is_added():
    trees, policy = completed(KTO(), ROWS), ModelPolicy(tiny_llama())
    keys = [key for tree in trees for key in keys_of(tree)]
    policy.references = References.of(dict.fromkeys(keys, -30.0))
    objective = with_auxiliary(KTO(), {"sft": 2.0})
    good = [Tree(tree.prompt, tree.branches[:1]) for tree in trees if tree.values["label"]]
    plain, taught = KTO().loss(policy, Pack.of(trees)), SFT().loss(policy, Pack.of(good))
    expected = plain.total.item() / 4 + 2 * taught.total.item() / taught.weight
    for packs in ([trees], [[tree] for tree in trees], [trees[1:2], trees[:1] + trees[2:]]):
        known = pooled(policy, objective, packs, Processes())
        losses = [objective.loss(policy, Pack.of(pack, pooled=known)) for pack in packs]
        assert sum(loss.total.item() for loss in losses) / 4 == pytest.approx(expected, rel=1e-5)
        assert sum(loss.metrics["sft"][1] for loss in losses) == taught.weight


def test_a_pack_runs_once_beside_another_objective(monkeypatch):
    trees, policy = completed(KTO(), ROWS), ModelPolicy(tiny_llama())
    keys = [key for tree in trees for key in keys_of(tree)]
    policy.references = References.of(dict.fromkeys(keys, -30.0))
    runs, plain = [], ModelPolicy.logprobs
    monkeypatch.setattr(
        ModelPolicy, "logprobs", lambda self, pack: runs.append(pack.tokens) or plain(self, pack)
    )
    objective, whole = with_auxiliary(KTO(), {"sft": 2.0}), Pack.of(trees)
    objective.loss(policy, whole)
    part = Pack.of(trees, pooled={"kl": 0.1, "share of sft": 0.5})
    objective.loss(policy, part)
    assert runs == [whole.tokens, part.only(0).tokens]


@pytest.mark.parametrize("option", ["desirable_weight", "undesirable_weight"])
def test_a_weight_that_is_not_positive_is_refused(option):
    with pytest.raises(ConfigError, match=option):
        KTO(**{option: 0.0})


@pytest.mark.parametrize("shift", [0.5, -0.5], ids=["z above 0", "z cut at 0"])
def test_the_loss_is_the_papers_and_so_is_it_in_parts(shift):
    """Log-ratios are set through the reference: r = 0.3·place, and `shift` for the completions of others."""
    objective = KTO(beta=0.4, desirable_weight=1.2, undesirable_weight=0.7)
    trees, policy = completed(objective, ROWS), ModelPolicy(tiny_llama())
    with torch.no_grad():
        sums = policy.logprobs(Pack.of(trees)).sums().tolist()
    ratios = [ratio for place in range(4) for ratio in (0.3 * place, shift + 0.1 * place)]
    keys = [key for tree in trees for key in keys_of(tree)]
    given = {key: total - ratio for key, total, ratio in zip(keys, sums, ratios, strict=True)}
    policy.references = References.of(given)
    z = max(0.0, sum(ratios[1::2]) / 4)
    expected = 0.0
    for tree, r in zip(trees, ratios[0::2], strict=True):
        sign, weight = (1, 1.2) if tree.values["label"] else (-1, 0.7)
        expected += weight * (1 - 1 / (1 + math.exp(-sign * 0.4 * (r - z))))
    whole = objective.loss(policy, Pack.of(trees))
    assert whole.total.item() == pytest.approx(expected, rel=1e-5)
    assert whole.weight == 4
    assert float(whole.metrics["kl"][0]) == pytest.approx(sum(ratios[1::2]), rel=1e-4)
    packs = [[tree] for tree in trees]
    known = pooled(policy, objective, packs, Processes())
    parts = [objective.loss(policy, Pack.of(pack, pooled=known)) for pack in packs]
    assert sum(part.total.item() for part in parts) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("empty", ["", " \n", [{"role": "assistant", "content": ""}]])
def test_an_empty_completion_is_unusable_and_leaves_the_others(empty):
    row = Row({"prompt": "a", "completion": empty, "label": True}, "rows.jsonl:3")
    with pytest.raises(UnusableRowError, match=r"rows.jsonl:3: with an empty completion"):
        KTO().encode(row, Codec(tiny_tokenizer()))


def test_the_margin_is_between_the_kinds():
    told = KTO().summarise({"rewards/desirable": 0.5, "rewards/undesirable": -0.25})
    assert told["margin"] == 0.75
    assert KTO().summarise({"rewards/desirable": 0.5}) == {"rewards/desirable": 0.5}
