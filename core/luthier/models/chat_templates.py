"""Chat templates by file or by name; a package with presets may bring more, in its ``chat_templates``."""

from __future__ import annotations

import logging
import re
from importlib import resources
from pathlib import Path
from typing import Any

from luthier.errors import ConfigError, unknown
from luthier.registry import catalogue
from luthier.text import bounded

log = logging.getLogger("luthier")

MARKER = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
"""What the tokens that begin and end turns look like."""


FOLD = (
    "{%- if messages and messages[0].role in ('system', 'developer') -%}"
    "{%- if messages[1:] and messages[1].role == 'user' -%}{%- set messages = [{'role': 'user', 'content': "
    "messages[0].content ~ '\n\n' ~ messages[1].content}] + messages[2:] -%}"
    "{%- else -%}{%- set messages = [{'role': 'user', 'content': messages[0].content}] + messages[1:] -%}"
    "{%- endif -%}{%- endif -%}"
)
"""Before a template that takes no system turn: puts it before the first user's, wherever it is used."""


def known_templates() -> dict[str, str]:
    """Return the Jinja text of every named template; built-in ones win over a plugin's of the same name."""
    templates: dict[str, str] = {}
    for package in ("luthier_conf", *catalogue().config_packages):
        folder = resources.files(package) / "chat_templates"
        for file in sorted(folder.iterdir(), key=lambda file: file.name) if folder.is_dir() else ():
            if file.name.endswith(".jinja"):
                templates.setdefault(file.name.removesuffix(".jinja"), file.read_text(encoding="utf-8"))
    return templates


def chat_template(wanted: str, tokenizer: Any) -> str:
    """Return the template that `wanted` is the file or the name of.

    A template whose marks `tokenizer` has no tokens for is used with a warning: they train as pieces.

    Raises:
        ConfigError: There is no such file and no such name, or the file cannot be read.
    """
    file = Path(wanted).expanduser()
    if file.is_file():
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"model.chat_template={wanted}: cannot be read: {error}") from error
    else:
        known = known_templates()
        if wanted not in known:
            message = unknown("template", wanted, known)
            raise ConfigError(f"model.chat_template={wanted} is no file of a Jinja template, and {message}")
        text = known[wanted]
    if pieces := [mark for mark in _marks(text, tokenizer) if mark not in tokenizer.get_vocab()]:
        log.warning(
            "model.chat_template=%s: %s is no token of this tokenizer and becomes several; "
            "model.chat_template=instruction needs none",
            wanted, " ".join(pieces),
        )  # fmt: skip
    return text


def _marks(template: str, tokenizer: Any) -> list[str]:
    """Return the marks that `template` writes around one question and its answer."""
    talk = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    try:
        with bounded():
            shown = str(tokenizer.apply_chat_template(talk, chat_template=template, tokenize=False))
    # What is wrong with a template is told with the first row, whose messages it refuses.
    except Exception:  # noqa: BLE001
        return []
    return sorted(set(MARKER.findall(shown)))
