"""Renderings of the beginnings of one conversation by a chat template."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from luthier.errors import DataError, LuthierError, UnusableRowError
from luthier.text.bounds import GIBIBYTES, bounded
from luthier.text.messages import Message, functions, plain, shortened
from luthier.text.said import said_by, with_texts

CALENDAR = (
    "{%- macro strftime_now(format) -%}{{ format | replace('%d', '26') | replace('%b', 'Jul') | "
    "replace('%B', 'July') | replace('%m', '07') | replace('%Y', '2024') }}{%- endmacro -%}"
)
"""The date of templates that write one, Llama 3's own: of today's, a resumed run would make other rows."""


class AmbiguousTurnError(UnusableRowError):
    """A turn whose tokens nobody can tell, as what stands before it is rendered otherwise once it follows."""

    def __init__(self, origin: str, told: str) -> None:
        super().__init__(origin, "with a turn before which the chat template writes something else")
        LuthierError.__init__(self, f"{origin}: {told}")


@dataclass(frozen=True)
class Conversation:
    """A conversation as the chat template of one tokenizer writes it.

    Attributes:
        tokenizer: A transformers tokenizer.
        messages: As `luthier.text.messages.read_messages` returns them.
        origin: Where it stands, for messages.
        tools: What may be called; None: nothing.
    """

    tokenizer: Any
    messages: Sequence[Message]
    origin: str
    tools: Any = None

    def first(self, count: int) -> Conversation:
        """Return the conversation of the first `count` messages."""
        return self if count == len(self.messages) else replace(self, messages=self.messages[:count])

    @functools.cached_property
    def said(self) -> list[list[tuple[str, str]]]:
        """What each text of each message is, and the text."""
        return [said_by(message) for message in self.messages]

    @functools.cached_property
    def marked(self) -> tuple[Conversation, list[list[tuple[str, str]]]]:
        """The conversation with a word of its own for every text, and what those are, by message."""
        marks: list[list[tuple[str, str]]] = []

        def mark(what: str, _: str) -> str:
            marks[-1].append((what, f"zq{len(marks)}x{len(marks[-1])}qz"))
            return marks[-1][-1][1]

        messages = []
        for message in self.messages:
            marks.append([])
            messages.append(with_texts(message, mark))
        return replace(self, messages=messages), marks

    @functools.cached_property
    def shape(self) -> str:
        """What conversations of one shape have in common."""
        return repr((self.marked[0].messages, self.tools))

    def until(self, turn: int) -> str:
        """Render the messages before `turn`, and what opens an assistant turn."""
        if turn not in self._opened:
            self._opened[turn] = self._render(self.messages[:turn], True)
        return self._opened[turn]

    def whole(self, count: int) -> str:
        """Render the first `count` messages, without an end token that only the last turn has."""
        text, end = self._render(self.messages[:count], False), self.tokenizer.eos_token
        if count < len(self.messages) and text.endswith(end):
            more = self._render(self.messages[: count + 1], False)
            return text if more.startswith(text) else text.removesuffix(end)
        return text

    def after(self, start: str, full: str, turn: int) -> str:
        """Return what `full` adds to `start`.

        Raises:
            AmbiguousTurnError: It begins otherwise, so that nobody can say which tokens the turn is made of.
        """
        if full.startswith(start):
            return full[len(start) :]
        place = next((i for i, (a, b) in enumerate(zip(start, full, strict=False)) if a != b), len(full))
        was, became = (repr(text[max(place - 10, 0) :][:30]) for text in (start, full))
        message = self.messages[turn]
        said = shortened(str(message.get("content") or "a tool call"), 30)
        raise AmbiguousTurnError(
            self.origin,
            f"the chat template renders what stands before turn {turn + 1} differently once "
            f"turn {turn + 1} ({message['role']}: '{said}') follows, {was} as {became}, so the supervised "
            "tokens are ambiguous; take another template with model.chat_template",
        )

    @functools.cached_property
    def _opened(self) -> dict[int, str]:
        return {}

    def _render(self, messages: Sequence[Message], open_turn: bool) -> str:
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{self.origin}: messages need a chat template and this tokenizer has none; "
                "set model.chat_template=FILE or a name such as chatml, or give prompt and completion as text"
            )
        try:
            return self._rendered(messages, open_turn, self._calls_as_text)
        except MemoryError as error:
            raise DataError(f"{self.origin}: the chat template takes more than {GIBIBYTES} GiB") from error
        # Templates raise jinja2 errors of their own making for roles or orders they do not take.
        except Exception as error:
            hint = "; model.system=fold puts the system turn into the user's" * (
                "system" in str(error).lower() and messages[0]["role"] == "system"
            )
            reason = shortened(str(error), 200)
            raise DataError(
                f"{self.origin}: the chat template refuses the messages: {reason}{hint}"
            ) from error

    @functools.cached_property
    def _calls_as_text(self) -> bool:
        """Whether the template takes arguments of calls as JSON text: a mapping it cannot add to a text.

        One that writes a mapping as Python does takes text as well.
        """
        calls = [call for message in self.messages for call in message.get("tool_calls") or ()]
        mappings = [call["arguments"] for call in functions(calls) if "arguments" in call]
        if not mappings:
            return False
        try:
            text = self._rendered(self.messages, False, False)
        except Exception:  # noqa: BLE001 (whatever it is, the other way is tried, and refused aloud)
            return True
        return any(repr(mapping) in text for mapping in mappings if "'" in repr(mapping))

    def _rendered(self, messages: Sequence[Message], open_turn: bool, calls_as_text: bool) -> str:
        template = self.tokenizer.get_chat_template(tools=self.tools)
        with bounded():
            return str(
                self.tokenizer.apply_chat_template(
                    [plain(message, template, calls_as_text) for message in messages],
                    tools=self.tools,
                    chat_template=CALENDAR * ("strftime_now" in template) + template,
                    tokenize=False,
                    add_generation_prompt=open_turn,
                )
            )
