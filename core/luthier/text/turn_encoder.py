"""From a rendered conversation to the tree of its supervised turns."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.text.conversation import Conversation
from luthier.text.text_encoder import TextEncoder
from luthier.text.written import Outline, check_tools, check_written, left_out, outline
from luthier.trees import Branch, Tree

_SHAPES = 10_000
"""Shapes of conversations that are remembered."""


@dataclass(frozen=True)
class TurnEncoder:
    """Finds the tokens of turns by rendering what stands before each, and checks that all of it is written.

    Attributes:
        tokenizer: A transformers tokenizer.
        encoder: Tokenises with it.
    """

    tokenizer: Any
    encoder: TextEncoder

    @functools.cached_property
    def turn_end(self) -> int:
        """The token that ends an assistant's turn under the chat template; without one, the end token."""
        probe = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
        known = self.tokenizer.chat_template and self._outline(Conversation(self.tokenizer, probe, ""), 1, ())
        ids = self.encoder.plain(known.tail or "") if known else []
        return next((token for token in ids if token in self.encoder.special), self.tokenizer.eos_token_id)

    def prompt(self, conversation: Conversation) -> list[int]:
        """Return the ids of a conversation up to where the assistant begins.

        Raises:
            UnusableRowError: The template leaves out something of it.
        """
        text = conversation.until(len(conversation.messages))
        self._check(conversation, text, None, ())
        return self.encoder.plain(text)

    def all(self, conversation: Conversation) -> Tree:
        """Return the tree of a conversation in which every token but the first is supervised.

        Raises:
            UnusableRowError: The template leaves out something of it.
        """
        count = len(conversation.messages)
        text = conversation.whole(count)
        self._check(conversation, text, count - 1, range(count))
        root, *rest = self.encoder.closed(self.encoder.plain(text))
        return Tree((root,), (Branch(tuple(rest)),), conversation.origin)

    def spoken(self, conversation: Conversation, turns: Sequence[int]) -> Tree:
        """Return the tree of a conversation that ends with the last of the supervised `turns`.

        Raises:
            UnusableRowError: The template leaves out something of it.
            AmbiguousTurnError: It renders what stands before a turn otherwise once the turn follows.
        """
        prompt = done = conversation.until(turns[0])
        ids: list[int] = []
        scored: list[bool] = []
        for turn in turns:
            before = conversation.until(turn)
            gap = self.encoder.continued(conversation.after(done, before, turn))
            done = conversation.whole(turn + 1)
            written = conversation.after(before, done, turn)
            spoken, rest = self._turn(conversation, turn, written)
            if turn == turns[-1]:
                spoken, rest = self.encoder.ended(spoken), []
            ids += gap + spoken + rest
            scored += [False] * len(gap) + [True] * len(spoken) + [False] * len(rest)
        self._check(conversation, done, turns[-1], turns[-1:])
        mask = None if all(scored) else tuple(scored)
        return Tree(tuple(self.encoder.plain(prompt)), (Branch(tuple(ids), mask),), conversation.origin)

    def are_ended(self, tree: Tree) -> bool:
        """Return whether every supervised turn of a conversation's `tree` ends in a token that controls."""
        (branch,) = tree.branches
        scored = branch.scored or ()
        own = zip(branch.ids, scored, scored[1:], strict=False)
        return all(token in self.encoder.special or not now or then for token, now, then in own)

    def _turn(self, conversation: Conversation, turn: int, written: str) -> tuple[list[int], list[int]]:
        """Return the ids of a supervised turn up to its end, and of what the template writes behind."""
        check_written(conversation, written, [turn], thoughts=True)
        known = self._outline(conversation, turn, (turn,))
        if known.missing:
            raise left_out(conversation.origin, known.missing)
        tail = known.tail
        if tail is None or not written.endswith(tail):
            own = [text for _, text in conversation.said[turn]][-1:]
            tail = written.rpartition(own[0])[2] if own and own[0] in written else written
        return self.encoder.turn(written, tail, self.turn_end)

    def _check(
        self, conversation: Conversation, text: str, turn: int | None, thoughtful: Collection[int]
    ) -> None:
        """Check that `text`, up to `turn` or as a prompt, says all that the conversation does.

        Raises:
            UnusableRowError: The template leaves out something; of turns that are not `thoughtful`, it may
                leave out thoughts.
        """
        if what := self._outline(conversation, turn, thoughtful).missing:
            raise left_out(conversation.origin, what)
        check_tools(conversation, text)
        for place in range(len(conversation.messages)):
            check_written(conversation, text, [place], thoughts=place in thoughtful)

    def _outline(self, conversation: Conversation, turn: int | None, thoughtful: Collection[int]) -> Outline:
        key = conversation.shape, turn, tuple(thoughtful)
        if key not in self._outlines:
            if len(self._outlines) >= _SHAPES:
                self._outlines.clear()
            self._outlines[key] = outline(conversation, turn, thoughtful)
        return self._outlines[key]

    @functools.cached_property
    def _outlines(self) -> dict[object, Outline]:
        return {}
