"""Attention over a mask, as GPUs run it: its block masks, its graphs, what it keeps; on the CPU."""

import functools
import gc
import importlib.util
import itertools
import logging
import random

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention import flex_attention as flex
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import tiny_llama
from luthier import Branch, ModelPolicy, Pack, Tree
from luthier.kernels import Turned, fuse, keep_rotations
from luthier.policy import attention, masked_attention
from luthier.policy.block_mask import block_mask, visible
from luthier.policy.forward import _picked
from luthier.policy.tile_attention import Terms
from luthier.trees import Segment, TreeSpans

CPU = torch.device("cpu")
SIZES = st.integers(1, 200)
TREES = st.lists(st.tuples(SIZES, SIZES, st.lists(SIZES, max_size=3)), min_size=1, max_size=3)


def laid_out(trees) -> TreeSpans:
    """Return the layout of prompts, their first children (which see them as one text) and the others."""
    segments, end = [], 0
    for prompt, first, others in trees:
        root = end
        segments.append(Segment(root, end := root + prompt + first))
        for size in others:
            segments.append(Segment(end, end := end + size, root, prompt))
    return TreeSpans(tuple(segments))


def listed(counts, places) -> set[tuple[int, int]]:
    """Return the blocks (row, column) that a block mask lists."""
    return {
        (row, column) for row, many in enumerate(counts[0, 0]) for column in places[0, 0, row, :many].tolist()
    }


@example([(100, 29, [])], 1)  # the one row of a block sees itself alone
@example([(300, 100, [3])], 256)  # the last row of a block just sees the first key of another
@settings(deadline=None, max_examples=30)
@given(TREES, st.sampled_from([None, 1, 5, 127, 128, 129, 1000]))
def test_the_block_mask_is_the_one_of_every_pair_of_tokens(trees, window):
    spans = laid_out(trees)
    end = spans.segments[-1].stop
    found = block_mask(spans, window, CPU)
    expected = flex.create_block_mask(visible(spans.table(CPU), window), None, None, end, end, device="cpu")
    assert found.shape == expected.shape
    for kind in ("", "full_"):
        for way in ("kv", "q"):
            ours, theirs = (
                listed(getattr(mask, f"{kind}{way}_num_blocks"), getattr(mask, f"{kind}{way}_indices"))
                for mask in (found, expected)
            )
            assert ours == theirs, (kind, way)


class Sizes(TorchDispatchMode):
    """Notes how many bytes each tensor that is made has."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.bytes += [x.nbytes for x in torch.utils._pytree.tree_leaves(made) if isinstance(x, torch.Tensor)]
        return made


@pytest.mark.parametrize("window", [None, 4096])
def test_a_block_mask_of_32k_tokens_takes_megabytes(window):
    spans = laid_out([(9000, 7000, [500] * 8), (10_000, 2768, [])])
    assert spans.segments[-1].stop == 32_768
    with Sizes() as made:
        block_mask(spans, window, CPU)
    assert max(made.bytes) <= 2 << 20  # every pair of tokens would be 4 GiB


# Graphs: torch compiles eight of one function, and runs what comes after as it is written.


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are compiled; they answer with queries, as flex attention cannot learn on a CPU."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return lambda *given: (
            next(x for x in given if isinstance(x, torch.Tensor) and x.dim() == 4).clone(),
        )

    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    masked_attention._compiled.cache_clear()
    yield compiled
    masked_attention._compiled.cache_clear()


def test_packs_of_all_lengths_share_two_graphs_a_kind_of_layer(graphs):
    lengths = random.Random(0)
    for _ in range(50):
        trees = [(lengths.randint(1, 700), lengths.randint(1, 90), []) for _ in range(lengths.randint(1, 4))]
        spans = laid_out(trees)
        for window, learns in itertools.product((None, 64), (True, False)):
            sizes = spans.segments[-1].stop, 16
            inputs = [torch.zeros(1, heads, *sizes, requires_grad=learns) for heads in (4, 2, 2)]
            with torch.set_grad_enabled(learns):
                masked_attention._flex(*inputs, spans, Terms(0.25, window, 50.0))
    assert len(graphs) <= 8


def test_soft_caps_and_factors_compile_apart_as_constants(graphs):
    spans = laid_out([(300, 5, [])])
    inputs = [torch.zeros(1, 2, 305, 16)] * 3
    for softcap, scale in ((30.0, 0.5), (50.0, 0.5), (50.0, 0.25), (None, 0.125), (30.0, 0.5)):
        masked_attention._flex(*inputs, spans, Terms(scale, None, softcap))
    nodes = [node for graph in graphs for node in graph.graph.nodes if "flex" in str(node.target)]
    assert sorted(node.args[5] for node in nodes) == [0.125, 0.25, 0.5, 0.5]
    assert not any(isinstance(argument, torch.fx.Node) for node in nodes for argument in node.args[7])


def test_behind_the_limit_of_graphs_torch_raises(graphs):
    attend = masked_attention._compiled((2, 16, 2, 16), torch.float32, Terms(0.5), None)
    mask = block_mask(laid_out([(300, 5, [])]), None, CPU)
    of_heads = [[torch.zeros(1, heads, 305, 16)] * 3 for heads in range(1, 10)]  # constants of a graph
    for inputs in of_heads[:-1]:
        attend(*inputs, mask, None, 0.5)
    with pytest.raises(FailOnRecompileLimitHit):
        attend(*of_heads[-1], mask, None, 0.5)


# What stays in memory, and what is left out


def rotations_kept(run) -> int:
    """Return how many rotations of queries and keys are remembered once `run` has gone forward."""
    gc.collect()
    out = run()
    kept = sum(type(thing) is Turned for thing in gc.get_objects())
    assert out.requires_grad
    return kept


def test_unrotated_queries_and_keys_are_kept_only_where_tiles_read_them(monkeypatch):
    pack = Pack.of([Tree((1,) * 9, (Branch((2,) * 5), Branch((3,) * 4)))])
    model = tiny_llama()
    fuse(model)
    policy = ModelPolicy(model)
    with policy.native_attention():
        assert rotations_kept(lambda: model(pack.input_ids, use_cache=False).logits) == 0
        keep_rotations(model, True)  # as it was: the measure sees them
        everyone = 2 * model.config.num_hidden_layers
        assert rotations_kept(lambda: model(pack.input_ids, use_cache=False).logits) == everyone
        monkeypatch.setattr(attention, "MASKED", {"cpu"})
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert rotations_kept(lambda: policy.logprobs(pack).values) == 0


def test_dropout_that_no_mask_has_is_left_out_and_said_once(monkeypatch, caplog):
    monkeypatch.setattr(attention, "MASKED", {"cpu"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    pack = Pack.of([Tree((1,) * 9, (Branch((2,) * 5), Branch((3,) * 4)))])
    policy = ModelPolicy(tiny_llama(attention_dropout=0.5))
    expected = policy.logprobs(pack).values
    with caplog.at_level(logging.WARNING, "luthier"):
        policy.model.train()
        assert torch.equal(policy.logprobs(pack).values, expected)
        assert torch.equal(policy.logprobs(pack).values, expected)
    assert [record.message.split(":")[1] for record in caplog.records] == [
        " attention dropout is left out, as no fused kernel with a mask of trees has it"
    ]


# Sums in one order: on a GPU indexing sorts before it adds, where index_select adds atomically


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    device = torch.device("cuda")


def test_hidden_states_that_branches_share_are_picked_by_what_sums_in_one_order():
    rows, places = torch.randn(5, 3, requires_grad=True), torch.tensor([1, 1, 4, 1])
    there = _picked(rows.as_subclass(OnCuda), places)
    here = _picked(rows, places)
    assert torch.equal(there, here)
    assert type(there.grad_fn.next_functions[0][0]).__name__ == "IndexBackward0"
    assert type(here.grad_fn).__name__ == "IndexSelectBackward0"
