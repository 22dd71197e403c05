"""The tokenizer of a merged model: the first model's, where all number their tokens alike."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from luthier.errors import ModelError
from luthier.models import from_pretrained
from luthier_plugins.commands.merge.io.inputs import MergeInput

_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja",
)  # fmt: skip


def tokenizer_home(models: Sequence[MergeInput]) -> Path | None:
    """Return the folder of the first tokenizer: an adapter's own, or its base's; None without any."""
    return next((home for model in models if (home := _home(model))), None)


def copy_tokenizer(models: Sequence[MergeInput], folder: Path) -> None:
    """Copy the first model's tokenizer into `folder`."""
    if home := tokenizer_home(models):
        for file in _files(home):
            shutil.copyfile(file, folder / file.name)


def compare_tokenizers(models: Sequence[MergeInput]) -> list[str]:
    """Refuse models that number their tokens differently; return notes of what else differs.

    Raises:
        ModelError: They do; a token is named.
    """
    homes = [(model, home) for model in models if (home := _home(model))]
    if not homes:
        return ["no model has a tokenizer, and none is written"]
    notes = []
    first, mine = homes[0]
    for other, its in homes[1:]:
        # The usual case is settled without reading a vocabulary of a hundred thousand tokens.
        if its == mine or _bytes(its) == _bytes(mine):
            continue
        from transformers import AutoTokenizer

        tokenizer, other_tokenizer = (from_pretrained(AutoTokenizer, str(home)) for home in (mine, its))
        if differing := tokenizer.get_vocab().items() ^ other_tokenizer.get_vocab().items():
            token = min(differing)[0]
            ids = " and ".join(
                str(each.get_vocab().get(token, "none")) for each in (tokenizer, other_tokenizer)
            )
            raise ModelError(
                f"{first.place} and {other.place} number their tokens differently ({token!r}: {ids}); only "
                "models of one vocabulary can be merged"
            )
        if tokenizer.chat_template != other_tokenizer.chat_template:
            notes.append(f"{other.label} has another chat template; {first.label}'s is written")
    return notes


def _home(model: MergeInput) -> Path | None:
    folders = (model.folder, model.checkpoint.folder)
    return next((folder for folder in folders if (folder / "tokenizer_config.json").is_file()), None)


def _files(home: Path) -> list[Path]:
    return [file for name in _FILES if (file := home / name).is_file()]


def _bytes(home: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in _files(home)}
