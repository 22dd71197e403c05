"""Tokens as a person reads them: whole characters, spaces kept, nothing unseen."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from helpers import END, tiny_tokenizer
from luthier_plugins.commands.preview.token_text import pieces, visible


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_bytes_of_a_character_are_one_piece():
    tokenizer = tiny_tokenizer()
    ids = ids_of(tokenizer, "né 日🎉.")
    read = pieces(tokenizer, ids, [True] * len(ids))
    assert "".join(one.text for one in read) == "né 日🎉."
    assert "\ufffd" not in "".join(one.text for one in read)
    assert [number for one in read for number in one.ids] == ids
    assert {"é", "🎉"} <= {one.text for one in read}
    places = [one.place for one in read]
    assert places == [sum(len(one.ids) for one in read[:count]) for count in range(len(read))]


def test_a_text_that_holds_the_replacement_sign_itself_loses_nothing():
    tokenizer = tiny_tokenizer()
    ids = ids_of(tokenizer, "a\ufffdb")
    read = pieces(tokenizer, ids, [True] * len(ids))
    assert [number for one in read for number in one.ids] == ids
    assert (read[0].text, read[-1].text) == ("a", "b")


def test_a_piece_is_trained_or_not_and_special_or_not_never_both():
    tokenizer = tiny_tokenizer()
    ids = ids_of(tokenizer, f"é{END}é")
    read = pieces(tokenizer, ids, [False, True, True, False, False], before=[5, 6])
    assert [(one.trained, one.special) for one in read] == [
        (False, False), (True, False), (True, True), (False, False)
    ]  # fmt: skip
    assert read[0].place == 2
    assert read[2].text == END


def test_spaces_that_a_decoder_strips_at_the_start_are_kept():
    # As SentencePiece's tokenizers do: every token by itself would lose its space.
    raw = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "<unk>": 2}, unk_token="<unk>"))
    raw.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    assert [one.text for one in pieces(tokenizer, [0, 1], [True, True])] == ["one", " two"]
    assert [one.text for one in pieces(tokenizer, [1], [True], before=[0])] == [" two"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", "a↵\nb"),
        ("\t", "⇥\t"),
        ("\x1b[31m", "␛[31m"),
        ("\u202e", "⟨U+202E⟩"),
        ("\x9b", "⟨U+009B⟩"),
        ("👩‍👧", "👩‍👧"),
    ],
)
def test_what_cannot_be_seen_is_shown(text, shown):
    assert visible(text) == shown
