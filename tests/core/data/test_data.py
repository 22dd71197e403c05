"""Encoding is counted, held-out rows are kept apart, batches are a function of seed and epoch."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from helpers import tiny_tokenizer
from luthier import Codec, DataError, DataSource, Row
from luthier.data.data import Encoded, encode
from luthier.data.sampler import Sampler
from luthier_plugins.objectives.sft import SFT


@dataclass(frozen=True)
class Listed(DataSource):
    """Rows from a list."""

    pairs: list[tuple[str, str]] = field(default_factory=list)

    def rows(self) -> Iterator[Row]:
        for index, (prompt, completion) in enumerate(self.pairs):
            yield Row({"prompt": prompt, "completion": completion}, f"rows[{index}]")


def encoded(*pairs: tuple[str, str], max_length: int = 64) -> Encoded:
    return encode(Listed(list(pairs)), SFT(), Codec(tiny_tokenizer()), max_length)


def test_rows_too_long_are_dropped_counted_and_shown():
    # users.md row 8: the completion vanishes without a word.
    data = encoded(("a", "b"), ("a" * 100, "b"), ("c", "d"), max_length=20)
    assert [row.origin for row in data.rows] == ["rows[0]", "rows[2]"]
    assert dict(data.dropped) == {"longer than 20 tokens": 1}
    assert "dropped: 1 longer than 20 tokens" in data.summary()


def test_rows_too_long_are_cut_on_request_counted_and_shown():
    pairs = [("a", "b"), ("a" * 100, "b"), ("c", "d" * 100)]
    left = encode(Listed(pairs), SFT(), Codec(tiny_tokenizer()), 20, overflow="truncate_left")
    assert [tree.tokens for tree in left.trees][1] == 20
    assert left.trees[1].branches == encoded(("a", "b")).trees[0].branches
    told = "dropped: 1 longer than 20 tokens without the prompt · truncated: 1 cut on the left to 20 tokens"
    assert told in left.summary()
    right = encode(Listed(pairs), SFT(), Codec(tiny_tokenizer()), 20, overflow="truncate_right")
    assert (dict(right.dropped), dict(right.truncated)) == (
        {"longer than 20 tokens in the prompt alone": 1},
        {"cut on the right to 20 tokens": 1},
    )
    with pytest.raises(DataError, match=r"rows\[1\]: .* tokens are more than max_length=20"):
        encode(Listed(pairs), SFT(), Codec(tiny_tokenizer()), 20, overflow="refuse")


def test_rows_that_are_not_kept_are_still_compared_with_held_out_ones():
    source, codec = Listed([("a", "b"), ("c", "d"), ("e", "f")]), Codec(tiny_tokenizer())
    for supervise in ("assistant", "all"):
        data = encode(source, SFT(supervise=supervise), codec, 64, keep_rows=False)
        kept = data.without(encoded(("c", "other")))
        assert (data.rows, kept.rows) == ([], [])
        assert [tree.origin for tree in kept.trees] == ["rows[0]", "rows[2]"]
        assert kept.digests().tolist() == [int(data.digests()[i]) for i in (0, 2)]


def test_the_header_fits_a_terminal_and_counts_what_is_used():
    data = encoded(("a", "b"), ("a" * 100, "b"), ("c", "defg"), max_length=20)
    used, left_out = data.lines("data")
    assert used.startswith("data      2 rows · ")
    assert f"{data.tokens} tokens, " in used
    assert "longest " in used
    assert left_out == "          dropped: 1 longer than 20 tokens"
    assert max(map(len, (used, left_out))) <= 100


def test_no_usable_row_is_an_error_that_says_why():
    with pytest.raises(DataError, match=r"no usable row \(2 longer than 3 tokens\)"):
        encoded(("abc", "defg"), ("abcd", "efg"), max_length=3)
    with pytest.raises(DataError, match="it is empty"):
        encoded()


def test_held_out_prompts_are_not_trained_on():
    data = encoded(("a", "b"), ("c", "d"), ("e", "f"))
    kept = data.without(encoded(("c", "other")))
    assert [row.fields["prompt"] for row in kept.rows] == ["a", "e"]
    assert kept.dropped["also in eval_data"] == 1
    assert "dropped" not in data.without(encoded(("z", "z"))).summary()


def test_a_row_of_another_shape_is_named():
    class Odd(Listed):
        def rows(self) -> Iterator[Row]:
            yield Row({"question": "a"}, "rows.jsonl:7")

    with pytest.raises(DataError, match=r"rows.jsonl:7: has question; sft expects 'prompt' and 'completion'"):
        encode(Odd(), SFT(), Codec(tiny_tokenizer()), 64)


def test_every_example_comes_once_an_epoch_in_a_new_order():
    sampler = Sampler(size=10, batch_size=4, shuffle=True, seed=1)
    assert sampler.steps_per_epoch == 3
    batches = [list(sampler.batch(step)) for step in range(6)]
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    first, second = (list(itertools.chain(*half)) for half in (batches[:3], batches[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert batches == [list(sampler.batch(step)) for step in range(6)]
    assert first != list(itertools.chain(*map(Sampler(10, 4, True, 2).batch, range(3))))


def test_without_shuffling_the_order_is_the_datas():
    assert [list(Sampler(5, 2, False, 0).batch(step)) for step in range(4)] == [[0, 1], [2, 3], [4], [0, 1]]


def test_conversations_that_only_begin_alike_are_not_the_same():
    def talk(answer: str) -> Row:
        messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": answer}]
        return Row({"messages": messages}, answer)

    class Talks(Listed):
        def rows(self) -> Iterator[Row]:
            yield from (talk(answer) for _, answer in self.pairs)

    codec = Codec(tiny_tokenizer())
    data = encode(Talks([("", "a"), ("", "b")]), SFT(), codec, 64)
    kept = data.without(encode(Talks([("", "b"), ("", "c")]), SFT(), codec, 64))
    assert [row.origin for row in kept.rows] == ["a"]


def test_a_text_that_no_tokenizer_takes_is_named():
    with pytest.raises(DataError, match=r"rows\[0\]: the tokenizer refuses the text"):
        encoded(("\ud800", "b"))
