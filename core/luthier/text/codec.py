"""From text to token ids: one function for training and inference, so both see the same ids.

Text is rendered once by the chat template and tokenised without added special tokens; which tokens are
supervised comes from rendering prefixes of the conversation, never from searching for marker strings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from luthier.errors import DataError, UnusableRowError
from luthier.text.conversation import AmbiguousTurnError, Conversation
from luthier.text.messages import (
    KEYS,
    Message,
    check_length,
    is_empty,
    is_trained,
    read_messages,
    says_nothing,
)
from luthier.text.said import Each, in_messages, in_value
from luthier.text.text_encoder import TextEncoder
from luthier.text.turn_encoder import TurnEncoder
from luthier.trees import Branch, Tree

Prompt = str | Sequence[Message]
Supervise = Literal["assistant", "last", "all", "each"]
"""All assistant turns, the last one, every token but the first, or each assistant turn in its own tree."""


@dataclass(frozen=True)
class Codec:
    """Renders and tokenises with one tokenizer.

    Attributes:
        tokenizer: A transformers tokenizer.
        noted: What a person should know of the rows that were encoded: what it is, and where they stand.
    """

    tokenizer: Any
    noted: dict[str, dict[str, None]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self.tokenizer.chat_template)

    @property
    def turn_end(self) -> int:
        """The token that ends an assistant's turn under the chat template; without one, the end token."""
        return self._turns.turn_end

    def prompt_ids(self, prompt: Prompt, origin: str = "", tools: Any = None) -> list[int]:
        """Return the ids a completion of `prompt` continues — in training and in generation alike.

        A string is taken as it is (with the special tokens the tokenizer starts a text with); a list of
        messages is rendered by the chat template up to where the assistant begins.

        Raises:
            UnusableRowError: The chat template leaves out something of the messages.
            DataError: It is neither, or nothing becomes of it.
        """
        prompt = read_messages(prompt, "prompt", origin)
        if isinstance(prompt, str):
            ids = self._encoder.start(self._read(prompt, origin))
        else:
            ids = self._turns.prompt(self._conversation(prompt, origin, tools))
        if not ids:
            raise DataError(f"{origin}: the prompt is empty and the tokenizer adds no token before a text")
        return ids

    def pair(
        self,
        prompt: Prompt,
        completion: Prompt,
        origin: str,
        supervise: Supervise = "assistant",
        tools: Any = None,
    ) -> Tree:
        """Return the tree of a prompt and its one completion, which is supervised.

        Of a completion of several messages (a tool is called, and answers) the assistant's are.

        Raises:
            UnusableRowError: Nothing can be learned from it, or the template leaves out something of it.
            DataError: It is no prompt or no completion.
        """
        prompt = read_messages(prompt, "prompt", origin)
        completion = read_messages(completion, "completion", origin)
        if says_nothing(completion):
            raise UnusableRowError(origin, "with an empty completion")
        if isinstance(prompt, str) and isinstance(completion, str):
            ids = self.prompt_ids(prompt, origin)
            start = 1 if supervise == "all" else len(ids)
            ids += self._encoder.ended(self.continuation(completion, origin))
            return Tree(tuple(ids[:start]), (Branch(tuple(ids[start:])),), origin)
        return self._tree(*joined(prompt, completion, origin), origin, supervise, tools)

    def conversation(
        self, messages: Sequence[Message], origin: str, supervise: Supervise = "assistant", tools: Any = None
    ) -> Tree:
        """Return the tree of a conversation: the assistant turns that `supervise` says, and nothing else.

        The root reaches up to where the first supervised turn begins.

        Raises:
            UnusableRowError: Nothing can be learned from it, or the template leaves out something of it.
            AmbiguousTurnError: It has no single tree: see `trees`.
            DataError: It is no conversation.
        """
        return self._tree(_listed(messages, origin), 0, origin, supervise, tools)

    def trees(
        self,
        messages: Sequence[Message],
        origin: str,
        supervise: Supervise = "assistant",
        tools: Any = None,
        first: int = 0,
    ) -> list[Tree]:
        """Return the tree of a conversation, or one of each supervised turn, rendered as it is answered.

        Each turn has one where `supervise` says so, and where the template renders turns otherwise once
        others follow: those that forget earlier thoughts do, and those that end the last turn alone.

        Args:
            messages: The conversation.
            origin: Where it stands.
            supervise: What is trained.
            tools: What may be called.
            first: Earlier turns are not supervised.

        Raises:
            UnusableRowError: As `conversation`.
            DataError: As `conversation`.
        """
        messages = _listed(messages, origin)
        turns = _supervised(messages, first, supervise, origin)
        if supervise != "each":
            try:
                tree = self._tree(messages, first, origin, supervise, tools)
                if self._turns.are_ended(tree):
                    return [tree]
            except AmbiguousTurnError:
                if len(turns) < 2:
                    raise
            self._note("with a tree for each turn, as the chat template rewrites earlier turns", origin)
        conversation = self._conversation(messages, origin, tools)
        return [self._turns.spoken(conversation.first(turn + 1), [turn]) for turn in turns]

    def pairs(
        self,
        prompt: Prompt,
        completion: Prompt,
        origin: str,
        supervise: Supervise = "assistant",
        tools: Any = None,
    ) -> list[Tree]:
        """Return the tree of a prompt and its completion, or one of each supervised turn: see `trees`."""
        prompt = read_messages(prompt, "prompt", origin)
        completion = read_messages(completion, "completion", origin)
        if isinstance(prompt, str) or isinstance(completion, str) or says_nothing(completion):
            return [self.pair(prompt, completion, origin, supervise, tools)]
        messages, first = joined(prompt, completion, origin)
        return self.trees(messages, origin, supervise, tools, first)

    def document(self, text: str, origin: str) -> Tree:
        """Return the tree of a plain text: every token but the first is supervised, the end token too.

        Raises:
            UnusableRowError: It is empty.
            DataError: It is no text, or a single token.
        """
        if not isinstance(text, str):
            raise DataError(f"{origin}: text must be a text with something in it, got {type(text).__name__}")
        if not text.strip():
            raise UnusableRowError(origin, "with an empty text")
        check_length(len(text), origin)
        first, *rest = self._encoder.closed(self._encoder.start(self._read(text, origin)))
        if not rest:
            raise DataError(f"{origin}: the text is one token, and nothing before it predicts it")
        return Tree((first,), (Branch(tuple(rest)),), origin)

    def continuation(self, text: str, origin: str | None = None) -> list[int]:
        """Return the ids of a text that continues another one, with no end token; of a row's at `origin`."""
        return self._encoder.continued(text if origin is None else self._read(text, origin))

    def text(self, ids: Sequence[int]) -> str:
        """Return generated `ids` as text, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    @functools.cached_property
    def _encoder(self) -> TextEncoder:
        return TextEncoder(self.tokenizer)

    @functools.cached_property
    def _turns(self) -> TurnEncoder:
        return TurnEncoder(self.tokenizer, self._encoder)

    def _note(self, what: str, origin: str) -> None:
        self.noted.setdefault(what, {})[origin] = None

    def _conversation(self, messages: Sequence[Message], origin: str, tools: Any) -> Conversation:
        """Return the conversation of `messages`; what is odd about them is noted."""
        template = str(self.tokenizer.chat_template)
        for key in {key for message in messages for key in message if key not in KEYS or key == "name"}:
            if key not in template:
                self._note(f"with '{key}' in their messages, which nothing reads", origin)
        if any(message.get("weight", 0) == 1 and message["role"] == "user" for message in messages):
            self._note("with a user's turn that is flagged to be trained, and is not", origin)
        messages = self._read(messages, origin, in_messages)
        return Conversation(self.tokenizer, messages, origin, self._read(tools or None, origin))

    def _read(self, value: Any, origin: str, put: Callable[[Any, Each], Any] = in_value) -> Any:
        """Return what a row holds; control tokens that it spells are noted, or hidden where they are text."""
        spelled: list[str] = []

        def hide(_: str, text: str) -> str:
            spelled.extend(self._encoder.spelled(text))
            return self._encoder.hide(text)

        hidden = put(value, hide)
        if self.tokenizer.init_kwargs.get("control_tokens") == "text":
            return hidden
        if spelled:
            name = min(spelled, key=self.tokenizer.convert_tokens_to_ids)
            self._note(f"that spell control tokens, e.g. {name} (see model.control_tokens)", origin)
        return value

    def _tree(
        self, messages: Sequence[Message], first: int, origin: str, supervise: Supervise, tools: Any
    ) -> Tree:
        """Encode `messages`; assistant turns before the `first` are not supervised."""
        turns = _supervised(messages, first, supervise, origin)
        conversation = self._conversation(messages, origin, tools)
        if supervise == "all":
            return self._turns.all(conversation)
        return self._turns.spoken(conversation.first(turns[-1] + 1), turns)


def joined(prompt: Any, completion: Any, origin: str) -> tuple[list[Message], int]:
    """Return prompt and completion as one conversation, and how many messages are the prompt's.

    Raises:
        DataError: They are not both messages, or the completion begins with somebody else's.
    """
    if isinstance(prompt, str) or isinstance(completion, str):
        raise DataError(f"{origin}: prompt and completion must both be text or both be messages")
    if completion[0]["role"] != "assistant":
        role = completion[0]["role"]
        raise DataError(f"{origin}: the completion must begin with an assistant message, got '{role}'")
    return [*prompt, *completion], len(prompt)


def _listed(messages: Any, origin: str) -> list[Message]:
    read: Any = read_messages(messages, "messages", origin)
    if isinstance(read, str):
        raise DataError(f"{origin}: messages must be a list of messages, got a text")
    return list(read)


def _supervised(messages: Sequence[Message], first: int, supervise: Supervise, origin: str) -> list[int]:
    """Return the assistant turns from the `first` on that are trained.

    Raises:
        UnusableRowError: There is none, or one is empty.
        DataError: The first opens the conversation; or one is flagged and all tokens are to be trained.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first]
    if not turns:
        raise UnusableRowError(origin, "without an assistant turn to learn from")
    turns = turns[-1:] if supervise == "last" else turns
    trained = [turn for turn in turns if is_trained(messages[turn])]
    if not trained:
        raise UnusableRowError(origin, "with flags that no turn is to be trained")
    if supervise == "all" and trained != turns:
        raise DataError(
            f"{origin}: a turn is flagged not to be trained, and objective.supervise=all trains every token; "
            "choose supervise=assistant"
        )
    if trained[0] == 0:
        raise UnusableRowError(origin, "with an assistant turn that nothing stands before")
    if any(is_empty(messages[turn]) for turn in trained):
        raise UnusableRowError(origin, "with an empty assistant turn")
    return trained
