"""From text to token ids: one function for training and inference, so both see the same ids.

Text is rendered once by the chat template and tokenised without added special tokens; which tokens are
supervised comes from rendering prefixes of the conversation, never from searching for marker strings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.errors import DataError
from luthier.tree import Branch, Tree

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]


@dataclass(frozen=True)
class Codec:
    """Renders and tokenises with one tokenizer.

    Attributes:
        tokenizer: A transformers tokenizer.
    """

    tokenizer: Any

    def prompt_ids(self, prompt: Prompt, origin: str = "") -> list[int]:
        """Return the ids a completion of `prompt` continues — in training and in generation alike.

        A string is taken as it is (with the special tokens the tokenizer starts a text with); a list of
        messages is rendered by the chat template up to where the assistant begins.
        """
        check_prompt(prompt, "prompt", origin)
        if isinstance(prompt, str):
            ids = self._start(prompt)
        else:
            ids = self._plain(self._render(prompt, True, origin))
        if not ids:
            raise DataError(f"{origin}: the prompt is empty and the tokenizer adds no token before a text")
        return ids

    def pair(self, prompt: Prompt, completion: Prompt, origin: str) -> Tree:
        """Return the tree of a prompt and its one completion, of which every token is supervised."""
        check_prompt(prompt, "prompt", origin)
        check_prompt(completion, "completion", origin)
        if isinstance(prompt, str) != isinstance(completion, str):
            raise DataError(f"{origin}: prompt and completion must both be text or both be messages")
        if isinstance(prompt, str):
            text = completion
        else:
            start = self._render(prompt, True, origin)
            text = _after(start, self._render([*prompt, *completion], False, origin), origin, "completion")
        assert isinstance(text, str)
        if not text.strip():
            raise DataError(f"{origin}: the completion is empty; drop the row or give it a text")
        ids = self._ended(self._plain(text))
        return Tree(tuple(self.prompt_ids(prompt, origin)), (Branch(tuple(ids)),), origin)

    def conversation(self, messages: Sequence[Message], origin: str) -> Tree:
        """Return the tree of a conversation: all assistant turns are supervised, nothing else is.

        The root reaches up to where the first assistant turn begins.
        """
        check_prompt(messages, "messages", origin)
        if isinstance(messages, str):
            raise DataError(f"{origin}: messages must be a list of messages, got a text")
        turns = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
        if not turns or turns[0] == 0:
            raise DataError(f"{origin}: a conversation needs an assistant turn after another one")
        prompt = self._render(messages[: turns[0]], True, origin)
        ids: list[int] = []
        scored: list[bool] = []
        done = prompt
        for turn in turns:
            name = f"turn {turn + 1}"
            before = self._render(messages[:turn], True, origin)
            gap = self._plain(_after(done, before, origin, name))
            done = self._render(messages[: turn + 1], False, origin)
            spoken, rest = self._split(self._plain(_after(before, done, origin, name)))
            ids += gap + spoken + rest
            scored += [False] * len(gap) + [True] * len(spoken) + [False] * len(rest)
        kept = len(scored) - scored[::-1].index(True) if True in scored else 0
        if not kept:
            raise DataError(f"{origin}: no assistant token to supervise")
        return Tree(tuple(self._plain(prompt)), (Branch(tuple(ids[:kept]), tuple(scored[:kept])),), origin)

    def text(self, ids: Sequence[int]) -> str:
        """Return generated `ids` as text, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _render(self, messages: Sequence[Message], open_turn: bool, origin: str) -> str:
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{origin}: messages need a chat template and this tokenizer has none; "
                "set model.chat_template=FILE, or give prompt and completion as text"
            )
        try:
            rendered = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=open_turn
            )
        # Templates raise jinja2 errors of their own making for roles or orders they do not take.
        except Exception as error:
            raise DataError(f"{origin}: the chat template refuses the messages: {error}") from error
        return str(rendered)

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _start(self, text: str) -> list[int]:
        """Tokenise with the tokens that start a text (BOS), but without those that end one."""
        marked = list(self.tokenizer(text)["input_ids"])
        plain = self._plain(text)
        added = len(marked) - len(plain)
        # From the far end, so that of an empty text everything that starts it is kept.
        starts = next((n for n in range(added, -1, -1) if marked[n : n + len(plain)] == plain), 0)
        return marked[: starts + len(plain)]

    def _split(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Split after the last end token: what a template writes behind it is never generated."""
        end = self.tokenizer.eos_token_id
        last = len(ids) - ids[::-1].index(end) if end in ids else len(ids)
        return ids[:last], ids[last:]

    def _ended(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        ids = self._split(ids)[0]
        special = set(self.tokenizer.all_special_ids)
        return ids if end is None or (ids and ids[-1] in special) else [*ids, end]


def check_prompt(value: object, what: str, origin: str) -> None:
    """Check that `value` is text, or a list of messages with a role and a content.

    Raises:
        DataError: It is neither; the message says what it is.
    """
    if isinstance(value, str):
        return
    if not isinstance(value, Sequence) or not value:
        found = "an empty list" if isinstance(value, Sequence) else type(value).__name__
        raise DataError(f"{origin}: {what} must be text or a list of messages, got {found}")
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"{origin}: {what}, message {number}: expected {{'role': …, 'content': …}}")
        if not isinstance(message.get("content"), str):
            found = type(message.get("content")).__name__
            raise DataError(f"{origin}: {what}, message {number}: content must be text, got {found}")


def _after(start: str, full: str, origin: str, what: str) -> str:
    if not full.startswith(start):
        raise DataError(
            f"{origin}: the chat template renders what stands before {what} differently once {what} follows, "
            "so the supervised tokens are ambiguous; choose another template with model.chat_template=FILE"
        )
    return full[len(start) :]
