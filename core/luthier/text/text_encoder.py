"""Token ids of texts that begin, continue or end something."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import Any

_HIDDEN = re.compile("[\ud800-\udfff]")
"""What stands for control tokens that a text spells without meaning: surrogates, as no text has any alone."""


@dataclass(frozen=True)
class TextEncoder:
    """Tokenises with one tokenizer.

    Attributes:
        tokenizer: A transformers tokenizer.
    """

    tokenizer: Any
    _counts: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)
    _stand_ins: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def plain(self, text: str) -> list[int]:
        """Tokenise `text` without added special tokens."""
        if _HIDDEN.search(text):
            return [token for part in self._apart.split(text) for token in self._part(part)]
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def continued(self, text: str) -> list[int]:
        """Tokenise what continues another text: SentencePiece would put a space before what begins one."""
        if not text:
            return []
        ids = self.plain(f"{self.tokenizer.eos_token}{text}") if self._anchored else []
        return ids[1:] if ids[:1] == [self.tokenizer.eos_token_id] else self.plain(text)

    def start(self, text: str) -> list[int]:
        """Tokenise with the tokens that start a text (BOS, once), but without those that end one."""
        plain, starts = self.plain(text), self._starts
        # A text that spells its own: rendered elsewhere, or copied from a prompt.
        doubled = starts[-1:] == plain[:1] == [self.tokenizer.bos_token_id]
        return starts[: len(starts) - doubled] + plain

    @functools.cached_property
    def _starts(self) -> list[int]:
        """What the tokenizer puts before a text."""
        marked, plain = list(self.tokenizer("a")["input_ids"]), self.plain("a")
        places = range(len(marked) - len(plain), -1, -1)
        return marked[: next((n for n in places if marked[n : n + len(plain)] == plain), 0)]

    def turn(self, written: str, tail: str, end: int) -> tuple[list[int], list[int]]:
        """Tokenise what a template writes of a turn, split behind the token that ends it.

        Args:
            written: All of it; what stands behind the end is never generated.
            tail: What of it stands behind the turn's own text, which may spell end tokens itself.
            end: The token that ends turns.
        """
        ids = self.continued(written)
        special = [place for place, token in enumerate(ids) if token in self.special]
        behind = special[len(special) - self._controls(tail) :]
        stop = next((place + 1 for place in behind if ids[place] == end), None)
        if stop is None:
            stop = self._stop(ids) if behind else len(ids)
        return ids[:stop], ids[stop:]

    def _controls(self, tail: str) -> int:
        """Return how many special tokens are in what a template writes behind a turn."""
        if tail not in self._counts:
            self._counts[tail] = sum(token in self.special for token in self.plain(tail))
        return self._counts[tail]

    def ended(self, ids: list[int]) -> list[int]:
        """Cut the white space behind the end token of an answer, or give it one."""
        kept = ids[: self._stop(ids)]
        return kept if kept and kept[-1] in self.special else [*ids, self.tokenizer.eos_token_id]

    def closed(self, ids: list[int]) -> list[int]:
        """Give a text an end token unless it ends with one; of a text nothing is cut."""
        stop = self._stop(ids)
        return ids if stop and ids[stop - 1] in self.special else [*ids, self.tokenizer.eos_token_id]

    def _stop(self, ids: list[int]) -> int:
        """Return where an answer ends: behind its last special token if only white space follows it."""
        last = max((place + 1 for place, token in enumerate(ids) if token in self.special), default=0)
        return last if last and not self.tokenizer.decode(ids[last:]).strip() else len(ids)

    @functools.cached_property
    def special(self) -> frozenset[int]:
        """The tokens that control: begin, end, roles."""
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset([*self.tokenizer.all_special_ids, *(i for i, token in added if token.special)])

    def spelled(self, text: str) -> list[str]:
        """Return the special tokens that `text` spells."""
        return self._apart.findall(text)

    def hide(self, text: str) -> str:
        """Return `text` with characters for the special tokens that it spells, so that they become text."""
        return self._apart.sub(lambda found: self._stand_in(found[0]), text)

    def _stand_in(self, name: str) -> str:
        return self._stand_ins.setdefault(name, chr(0xD800 + len(self._stand_ins)))

    def _part(self, text: str) -> list[int]:
        """Tokenise a special token, or a text in which none is meant."""
        if text in self._names:
            return [self.tokenizer.convert_tokens_to_ids(text)]
        for name, stand_in in self._stand_ins.items():
            text = text.replace(stand_in, name)
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    @functools.cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(map(str, self.tokenizer.convert_ids_to_tokens(list(self.special))))

    @functools.cached_property
    def _apart(self) -> re.Pattern[str]:
        """What splits a text into special tokens and what stands between them; by two letters, for speed."""
        names: dict[str, list[str]] = {}
        for name in sorted(self._names, key=len, reverse=True):
            names.setdefault(name[:2], []).append(re.escape(name[2:]))
        starts = (f"{re.escape(start)}(?:{'|'.join(rests)})" for start, rests in names.items())
        return re.compile(f"({'|'.join(starts) or '(?!)'})")

    @functools.cached_property
    def _anchored(self) -> bool:
        """Whether a text may follow the end token unchanged: one that strips takes white space with it."""
        token = self.tokenizer.added_tokens_decoder.get(self.tokenizer.eos_token_id)
        return token is not None and not token.rstrip
