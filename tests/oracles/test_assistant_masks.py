"""Masks against transformers' own, which reads markers that stock templates do not have."""

import random

import pytest

from helpers import tiny_tokenizer
from luthier import Codec

MARKED = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "trimmed": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content | trim }}<|im_end|>{% endgeneration %}{% else %}[{{ m.content | trim }}]{% endif %}"
    "{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("style", MARKED)
@pytest.mark.parametrize("seed", range(20))
def test_the_mask_is_the_one_that_generation_markers_give(style, seed):
    # users.md row 3: without markers transformers' mask is all zeros; prefixes need none.
    chance = random.Random(seed)
    roles = ["system"] * chance.randint(0, 1) + [
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
        "assistant",
    ]
    words = ["one", " two", "3\n", "<x>", "ü", "\n\n", "end."]
    talk = [{"role": role, "content": "a" + "".join(chance.choices(words, k=5)) + "."} for role in roles]
    tokenizer = tiny_tokenizer(add_bos=True)
    tokenizer.chat_template = MARKED[style]
    theirs = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    tree = Codec(tokenizer).conversation(talk, "f:1")
    branch = tree.branches[0]
    ids = list(tree.prompt + branch.ids)
    mask = [0] * len(tree.prompt) + [int(one) for one in branch.scored or [True] * len(branch.ids)]
    # What a template writes behind the last end token is not trained, and left out.
    assert ids == theirs["input_ids"][: len(ids)]
    assert mask == theirs["assistant_masks"][: len(ids)]
    assert not any(theirs["assistant_masks"][len(ids) :])
    assert sum(mask) > len(talk)
