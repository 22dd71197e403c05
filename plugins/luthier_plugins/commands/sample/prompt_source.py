"""Prompts from the command line, as rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import ListConfig

from luthier.contracts import DataSource, Row
from luthier.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Prompted(DataSource):
    """Each text a row of its own.

    Attributes:
        texts: The prompts.
        chat: Make messages of them: the model has a chat template.
    """

    texts: tuple[str, ...] = ()
    chat: bool = True

    @classmethod
    def of(cls, prompt: Any) -> Prompted:
        """Return the source of ``prompt=…``: a text, or a list of texts.

        Raises:
            ConfigError: It is neither.
        """
        texts = list(prompt) if isinstance(prompt, ListConfig | list) else [prompt]
        texts = (
            [] if prompt is None else [str(text) if isinstance(text, int | float) else text for text in texts]
        )
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise ConfigError(f"prompt={text!r} must be a text with something in it, or a list of such")
        return cls(texts=tuple(texts))

    def rows(self) -> Iterator[Row]:
        """Yield a row a text."""
        for number, text in enumerate(self.texts, 1):
            prompt = [{"role": "user", "content": text}] if self.chat else text
            yield Row({"prompt": prompt}, f"prompt {number}")
