"""From text to token ids: one function for training and inference, so both see the same ids.

Text is rendered once by the chat template and tokenised without added special tokens; which tokens are
supervised comes from rendering prefixes of the conversation, never from searching for marker strings.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from luthier.errors import DataError
from luthier.text.messages import Message, check_prompt, functions, is_empty, plain, shortened
from luthier.trees import Branch, Tree

Prompt = str | Sequence[Message]
Supervise = Literal["assistant", "last", "all"]
"""All assistant turns, the last one, or every token but the first."""

CALENDAR = (
    "{%- macro strftime_now(format) -%}{{ format | replace('%d', '26') | replace('%b', 'Jul') | "
    "replace('%B', 'July') | replace('%m', '07') | replace('%Y', '2024') }}{%- endmacro -%}"
)
"""The date of templates that write one, Llama 3's own: of today's, a resumed run would make other rows."""


@dataclass(frozen=True)
class Codec:
    """Renders and tokenises with one tokenizer.

    Attributes:
        tokenizer: A transformers tokenizer.
    """

    tokenizer: Any

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self.tokenizer.chat_template)

    def prompt_ids(self, prompt: Prompt, origin: str = "", tools: Any = None) -> list[int]:
        """Return the ids a completion of `prompt` continues — in training and in generation alike.

        A string is taken as it is (with the special tokens the tokenizer starts a text with); a list of
        messages is rendered by the chat template up to where the assistant begins.
        """
        check_prompt(prompt, "prompt", origin)
        if isinstance(prompt, str):
            ids = self._start(prompt)
        else:
            ids = self._plain(_Talk(self.tokenizer, prompt, origin, tools).until(len(prompt)))
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
        """
        check_prompt(prompt, "prompt", origin)
        check_prompt(completion, "completion", origin)
        if isinstance(prompt, str) and isinstance(completion, str):
            if not completion.strip():
                raise DataError(f"{origin}: the completion is empty; drop the row or give it a text")
            ids = self._ended(self._continued(completion))
            tree = Tree(tuple(self.prompt_ids(prompt, origin)), (Branch(tuple(ids)),), origin)
            return _all_supervised(tree) if supervise == "all" else tree
        if isinstance(prompt, str) or isinstance(completion, str):
            raise DataError(f"{origin}: prompt and completion must both be text or both be messages")
        if completion[0]["role"] != "assistant":
            role = completion[0]["role"]
            raise DataError(f"{origin}: the completion must begin with an assistant message, got '{role}'")
        if all(is_empty(message) for message in completion):
            raise DataError(f"{origin}: the completion is empty; drop the row or give it a text")
        return self._conversation([*prompt, *completion], len(prompt), origin, supervise, tools)

    def conversation(
        self, messages: Sequence[Message], origin: str, supervise: Supervise = "assistant", tools: Any = None
    ) -> Tree:
        """Return the tree of a conversation: the assistant turns that `supervise` says, and nothing else.

        The root reaches up to where the first supervised turn begins.
        """
        check_prompt(messages, "messages", origin)
        if isinstance(messages, str):
            raise DataError(f"{origin}: messages must be a list of messages, got a text")
        return self._conversation(messages, 0, origin, supervise, tools)

    def document(self, text: str, origin: str) -> Tree:
        """Return the tree of a plain text: every token but the first is supervised, the end token too."""
        if not isinstance(text, str) or not text.strip():
            description = "an empty text" if isinstance(text, str) else type(text).__name__
            raise DataError(f"{origin}: text must be a text with something in it, got {description}")
        first, *rest = self._closed(self._start(text))
        if not rest:
            raise DataError(f"{origin}: the text is one token, and nothing before it predicts it")
        return Tree((first,), (Branch(tuple(rest)),), origin)

    def continuation(self, text: str) -> list[int]:
        """Return the ids of a text that continues another one, with no end token."""
        return self._continued(text)

    def text(self, ids: Sequence[int]) -> str:
        """Return generated `ids` as text, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _conversation(
        self, messages: Sequence[Message], first: int, origin: str, supervise: Supervise, tools: Any
    ) -> Tree:
        """Encode `messages`; assistant turns before the `first` are not supervised."""
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first]
        turns = turns[-1:] if supervise == "last" else turns
        if not turns or turns[0] == 0:
            fault = "turn 1 is the assistant's" if turns else "there is none"
            raise DataError(f"{origin}: a conversation needs an assistant turn after another one; {fault}")
        for turn in turns:
            if is_empty(messages[turn]):
                raise DataError(
                    f"{origin}: turn {turn + 1}, the assistant's, is empty; drop the row or give it a text"
                )
        talk = _Talk(self.tokenizer, messages, origin, tools)
        talk.check_functions()
        if supervise == "all":
            root, *rest = self._closed(self._plain(talk.whole(len(messages))))
            return Tree((root,), (Branch(tuple(rest)),), origin)
        return self._spoken(talk, turns)

    def _spoken(self, talk: _Talk, turns: Sequence[int]) -> Tree:
        prompt = done = talk.until(turns[0])
        ids: list[int] = []
        scored: list[bool] = []
        for turn in turns:
            before = talk.until(turn)
            gap = self._continued(talk.after(done, before, turn, "set objective.supervise=last, or "))
            done = talk.whole(turn + 1)
            written = talk.after(before, done, turn)
            spoken, rest = self._split(self._continued(written))
            said = str(talk.messages[turn].get("content") or "").strip()
            if self._special.issuperset(spoken) and (not said or said not in written):
                raise DataError(
                    f"{talk.origin}: the chat template writes nothing of turn {turn + 1}, the assistant's; "
                    "take another with model.chat_template"
                )
            if turn == len(talk.messages) - 1:
                spoken, rest = self._ended(spoken), []
            ids += gap + spoken + rest
            scored += [False] * len(gap) + [True] * len(spoken) + [False] * len(rest)
        kept = len(scored) - scored[::-1].index(True)
        mask = None if all(scored[:kept]) else tuple(scored[:kept])
        return Tree(tuple(self._plain(prompt)), (Branch(tuple(ids[:kept]), mask),), talk.origin)

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _continued(self, text: str) -> list[int]:
        """Tokenise what continues another text: SentencePiece would put a space before what begins one."""
        anchor = self.tokenizer.eos_token
        ids = self._plain(f"{anchor}{text}") if text and self._anchored else []
        return ids[1:] if ids[:1] == [self.tokenizer.eos_token_id] else self._plain(text)

    @functools.cached_property
    def _anchored(self) -> bool:
        """Whether a text may follow the end token unchanged: one that strips takes white space with it."""
        token = self.tokenizer.added_tokens_decoder.get(self.tokenizer.eos_token_id)
        return token is not None and not token.rstrip

    def _start(self, text: str) -> list[int]:
        """Tokenise with the tokens that start a text (BOS, once), but without those that end one."""
        marked = list(self.tokenizer(text)["input_ids"])
        plain = self._plain(text)
        added = len(marked) - len(plain)
        # From the far end, so that of an empty text everything that starts it is kept.
        starts = next((n for n in range(added, -1, -1) if marked[n : n + len(plain)] == plain), 0)
        bos = self.tokenizer.bos_token_id
        # A text that spells its own: rendered elsewhere, or copied from a prompt.
        doubled = bos is not None and marked[:2] == [bos, bos] and plain[:1] == [bos]
        return marked[doubled : starts + len(plain)]

    def _split(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Split after the last end token: what a template writes behind it is never generated.

        Where a turn ends with another special token, as Llama 3's do, only white space may be behind it.
        """
        end = self.tokenizer.eos_token_id
        last = len(ids) - ids[::-1].index(end) if end in ids else 0
        if not last:
            last = max((place + 1 for place, token in enumerate(ids) if token in self._special), default=0)
            last = last if last and not self.tokenizer.decode(ids[last:]).strip() else len(ids)
        return ids[:last], ids[last:]

    def _ended(self, ids: list[int]) -> list[int]:
        """Cut what stands behind the end token of an answer, or give it one."""
        kept = self._split(ids)[0]
        return kept if kept and kept[-1] in self._special else [*ids, self.tokenizer.eos_token_id]

    def _closed(self, ids: list[int]) -> list[int]:
        """Give a text an end token unless it ends with one; of a text nothing is cut."""
        kept, rest = self._split(ids)
        closed = kept and kept[-1] in self._special and not self.tokenizer.decode(rest).strip()
        return ids if closed else [*ids, self.tokenizer.eos_token_id]

    @functools.cached_property
    def _special(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset([*self.tokenizer.all_special_ids, *(i for i, token in added if token.special)])


@dataclass(frozen=True)
class _Talk:
    """Renderings of the beginnings of one conversation."""

    tokenizer: Any
    messages: Sequence[Message]
    origin: str
    tools: Any

    def until(self, turn: int) -> str:
        """Render the messages before `turn`, and what opens an assistant turn."""
        return self._render(self.messages[:turn], True)

    def whole(self, count: int) -> str:
        """Render the first `count` messages, without an end token that only the last turn has."""
        text, end = self._render(self.messages[:count], False), self.tokenizer.eos_token
        if count < len(self.messages) and text.endswith(end):
            more = self._render(self.messages[: count + 1], False)
            return text if more.startswith(text) else text.removesuffix(end)
        return text

    def check_functions(self) -> None:
        """Refuse a template that leaves out what may be called, or is."""
        calls = [call for message in self.messages for call in message.get("tool_calls") or ()]
        names = functions(self.tools if isinstance(self.tools, list) else ()) + functions(calls)
        text = self.whole(len(self.messages)) if names else ""
        if missing := [name for name in names if name not in text]:
            raise DataError(
                f"{self.origin}: the chat template leaves out the function '{missing[0]}' of the row's tools "
                "or calls; take one that writes them with model.chat_template, e.g. chatml"
            )

    def after(self, start: str, full: str, turn: int, way_out: str = "") -> str:
        """Return what `full` adds to `start`; `way_out` is a mend to tell of, beside another template.

        Raises:
            DataError: It begins otherwise, so that nobody can say which tokens the turn is made of.
        """
        if full.startswith(start):
            return full[len(start) :]
        place = next((i for i, (a, b) in enumerate(zip(start, full, strict=False)) if a != b), len(full))
        was, became = (repr(text[max(place - 10, 0) :][:30]) for text in (start, full))
        message = self.messages[turn]
        said = shortened(str(message.get("content") or "a tool call"), 30)
        raise DataError(
            f"{self.origin}: the chat template renders what stands before turn {turn + 1} differently once "
            f"turn {turn + 1} ({message['role']}: '{said}') follows, {was} as {became}, so the supervised "
            f"tokens are ambiguous; {way_out}take another template with model.chat_template"
        )

    def _render(self, messages: Sequence[Message], open_turn: bool) -> str:
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{self.origin}: messages need a chat template and this tokenizer has none; "
                "set model.chat_template=FILE or a name such as chatml, or give prompt and completion as text"
            )
        try:
            template = self.tokenizer.get_chat_template(tools=self.tools)
            rendered = self.tokenizer.apply_chat_template(
                [plain(message) for message in messages],
                tools=self.tools,
                chat_template=CALENDAR * ("strftime_now" in template) + template,
                tokenize=False,
                add_generation_prompt=open_turn,
            )
        # Templates raise jinja2 errors of their own making for roles or orders they do not take.
        except Exception as error:
            reason = shortened(str(error), 200)
            raise DataError(f"{self.origin}: the chat template refuses the messages: {reason}") from error
        return str(rendered)


def _all_supervised(tree: Tree) -> Tree:
    rest = tree.prompt[1:] + tree.branches[0].ids
    return replace(tree, prompt=tree.prompt[:1], branches=(Branch(rest),))
