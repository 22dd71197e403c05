"""Solutions in steps: a text is cut into them, and each step ends in a token that can be marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luthier.errors import ConfigError, DataError, UnusableRowError
from luthier.text import Codec
from luthier.trees import Branch, Tree

SEPARATOR = "\n"


def split_steps(text: str, separator: str = SEPARATOR) -> list[str]:
    """Return the steps of `text`; what is empty is none."""
    return [step for step in text.split(separator) if step.strip()]


def check_separator(separator: str) -> None:
    """Refuse a separator that cannot end a step.

    Raises:
        ConfigError: It is empty.
    """
    if not separator:
        raise ConfigError("separator is empty; expected what stands between two steps, e.g. a line break")


def step_tree(
    prompt: Any,
    steps: Sequence[str],
    codec: Codec,
    origin: str,
    separator: str = SEPARATOR,
    tools: Any = None,
) -> Tree:
    """Return the tree of a prompt and a solution, in which the last token of every step is scored.

    Every step is tokenised by itself and followed by `separator`, so that the same step has the same tokens
    in training and in use, whatever follows.

    Raises:
        UnusableRowError: There is no step.
        DataError: A step is no text, or is empty.
    """
    ids: list[int] = []
    scored: list[bool] = []
    for number, step in enumerate(steps, 1):
        if not isinstance(step, str) or not step.strip():
            raise DataError(f"{origin}: step {number} must be a text with something in it, got {step!r}")
        own = codec.continuation(step, origin) + codec.continuation(separator)
        ids += own
        scored += [False] * (len(own) - 1) + [True]
    if not ids:
        raise UnusableRowError(origin, "without a step")
    return Tree(tuple(codec.prompt_ids(prompt, origin, tools)), (Branch(tuple(ids), tuple(scored)),), origin)
