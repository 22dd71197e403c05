"""The tokenizer of a model: loaded with a pad token and a chat template, and compared after saving."""

from pathlib import Path
from typing import Any

from luthier.config import ModelPlace
from luthier.errors import ConfigError, ModelError
from luthier.models import chat_templates as templates
from luthier.models.chat_templates import FOLD
from luthier.models.pretrained import from_pretrained, told
from luthier.text import Codec

_PROBE = "The naïve café: 12 + 3 = 15.\n\tdef f(x): return x<|im_start|>"


def load_tokenizer(base: str, revision: str | None = None) -> Any:
    """Return the tokenizer saved with `base`.

    A missing pad token becomes the end token: a new one would change the vocabulary. Nothing may mask by
    its id; lengths say where padding begins.

    Args:
        base: A folder or a hub name.
        revision: Branch, tag or commit at the hub.

    Raises:
        ModelError: There is no tokenizer, or it has no end token.
    """
    from transformers import AutoTokenizer

    tokenizer = from_pretrained(AutoTokenizer, base, revision=revision)
    told(base, lambda: tokenizer(_PROBE))  # of what is damaged, some is read at the first text
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{base}: its tokenizer has no end token; set eos_token in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_as(tokenizer: Any, config: ModelPlace) -> None:
    """Give `tokenizer` the chat template and the ways of reading messages that `config` asks for.

    Raises:
        ConfigError: There is no such template, or no such way.
    """
    if config.chat_template is not None:
        tokenizer.chat_template = templates.chat_template(config.chat_template, tokenizer)
    for name, known in (("system", "fold"), ("control_tokens", "text")):
        if (value := getattr(config, name)) not in ("keep", known):
            raise ConfigError(f"model.{name}={value}: expected keep or {known}")
    if config.system == "fold" and not str(tokenizer.chat_template or FOLD).startswith(FOLD):
        tokenizer.chat_template = f"{FOLD}{tokenizer.chat_template}"
    if config.control_tokens == "text":
        tokenizer.init_kwargs["control_tokens"] = "text"  # saved with it


def answer_ends(generation: Any, codec: Codec) -> list[int]:
    """Return the tokens that end an answer: the end that training teaches, and those the checkpoint names.

    Args:
        generation: The model's generation config, which is saved with the result.
        codec: Knows the end of a turn.
    """
    own = generation.eos_token_id
    ends = [codec.turn_end, codec.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(end for end in ends if end is not None))


def verify_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Check that the tokenizer saved in `folder` does what `tokenizer` does.

    Raises:
        ModelError: Ids, special tokens or chat template differ.
    """
    from transformers import AutoTokenizer

    saved = from_pretrained(AutoTokenizer, str(folder))
    for what, before, after in (
        ("vocabulary", tokenizer.get_vocab(), saved.get_vocab()),
        ("chat template", tokenizer.chat_template, saved.chat_template),
        ("special tokens", tokenizer.special_tokens_map, saved.special_tokens_map),
        ("ids of a sample text", tokenizer(_PROBE)["input_ids"], saved(_PROBE)["input_ids"]),
    ):
        if before != after:
            raise ModelError(f"{folder}: the tokenizer read back has another {what}; it was not saved whole")
