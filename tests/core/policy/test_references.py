"""References: keyed by contents, told apart by the model's weights, found again in a file."""

import dataclasses

import pytest
import torch

from helpers import tiny_llama
from luthier import Branch, LuthierError, ModelError, Pack, Tree
from luthier.adapters.linear_adapter import adapter_off
from luthier.policy import references as store
from luthier.policy.references import References, fingerprint, keys_of
from luthier_plugins.adapters.dora.dora import DoRA
from luthier_plugins.adapters.lora import LoRA

TREE = Tree((5, 6, 7), (Branch((8, 9)), Branch((8, 10), (False, True))), "row 1")


def test_a_key_is_the_prompt_the_completion_and_what_is_scored():
    first, second = keys_of(TREE)
    assert keys_of(dataclasses.replace(TREE, origin="elsewhere", values={"label": 1.0})) == [first, second]
    others = [
        Tree((5, 6), (Branch((8, 9)),)),
        Tree((5, 6), (Branch((7, 8, 9)),)),  # the same tokens in all
        Tree((5, 6, 7), (Branch((8, 9), (False, True)),)),
        Tree((5, 6, 7), (Branch((8, 11)),)),
        Tree((5, 6, 7), (Branch((8, 9, -1, 0)),)),
    ]
    assert len({first, second, *(key for tree in others for key in keys_of(tree))}) == 7


def test_sums_come_back_by_child_in_any_pack():
    first, second = keys_of(TREE)
    known = References.of({second: -2.0, first: -1.0})
    other = dataclasses.replace(TREE, branches=TREE.branches[::-1])
    assert known.sums(Pack.of([TREE, other])).tolist() == [-1.0, -2.0, -2.0, -1.0]
    assert known.sums(Pack.of([TREE]).only(1)).tolist() == [-2.0]


def test_what_was_never_measured_is_named_and_listed():
    known = References.of({keys_of(TREE)[0]: -1.0})
    with pytest.raises(LuthierError, match="row 1: the reference was not measured"):
        known.sums(Pack.of([TREE]))
    (left,) = known.missing([TREE])
    assert left.branches == TREE.branches[1:]
    assert list(References.of({}).missing([TREE])) == [TREE]
    assert list(References.of({}).missing([TREE, TREE])) == [TREE], "the same contents are measured once"
    assert known.plus({keys_of(TREE)[1]: -3.0, keys_of(TREE)[0]: -9.0}).sums(Pack.of([TREE])).tolist() == [
        -1,
        -3,
    ]


def test_a_file_holds_them_for_one_model(tmp_path):
    known = References.of(dict(zip(keys_of(TREE), (-1.5, -2.5), strict=True)))
    store.save_references(known, tmp_path / "new", "abc")
    back = store.load_references(tmp_path / "new", "abc")
    assert torch.equal(back.keys, known.keys)
    assert torch.equal(back.values, known.values)
    assert not len(store.load_references(tmp_path / "new", "other").keys)
    assert [path.name for path in store.other_references(tmp_path / "new", "other")] == [
        "reference-abc.safetensors"
    ]
    assert not store.other_references(tmp_path / "new", "abc")
    store.file_of(tmp_path, "abc").write_bytes(b"half a file")
    with pytest.raises(ModelError, match=r"is damaged .*remove it"):
        store.load_references(tmp_path, "abc")


def test_every_bit_of_a_weight_counts():
    model = tiny_llama()
    before = fingerprint(model)
    assert before == fingerprint(tiny_llama())
    assert before != fingerprint(model, torch.bfloat16)
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(1.0))
    assert fingerprint(model) != before


def test_swapped_weights_are_another_model():
    model = tiny_llama()
    before = fingerprint(model)
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight[[0, 1]] = weight[[1, 0]]
    assert fingerprint(model) != before


@pytest.mark.parametrize("adapter", [LoRA(rank=2), DoRA(rank=2)], ids=["lora", "dora"])
def test_an_adapter_that_is_off_does_not_count(adapter):
    model = tiny_llama()
    before = fingerprint(model)
    adapter.attach(model, torch.Generator().manual_seed(1))
    assert fingerprint(model) != before
    with adapter_off(model):
        assert fingerprint(model) == before
