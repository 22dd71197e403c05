"""`tokens`: how many tokens a data set has, by tokenizer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from luthier import Command, ConfigError, Register, hookimpl, option


@dataclass
class TokensConfig:
    """Count the tokens of a data set, by tokenizer."""

    data: Any = "???"
    tokenizers: list[str] = option([], "Folders or hub names, each with a tokenizer.")


@dataclass(frozen=True)
class Tokens(Command):
    """Count the tokens of a data set, by tokenizer."""

    summary: ClassVar[str] = "how many tokens a data set has, by tokenizer"
    examples: ClassVar[Sequence[str]] = ("tokens FOLDER FOLDER data=jsonl data.path=rows.jsonl",)
    options: ClassVar[type[Any]] = TokensConfig
    defaults: ClassVar[Mapping[str, Any]] = {"data": "???"}
    positionals: ClassVar[tuple[Any, ...]] = ("tokenizers", ...)

    def check(self, config: Any) -> None:
        """See `Command.check`."""
        if not config.tokenizers:
            raise ConfigError("tokenizers: expected at least one, e.g. luthier tokens FOLDER data=…")

    def run(self, config: Any) -> dict[str, int]:
        """Print and return how many tokens all rows have, by tokenizer."""
        from transformers import AutoTokenizer

        from luthier import build_method, laid_out

        source = build_method("data_source", config.data)
        rows = [laid_out(row, source, chat=False).fields for row in source.rows()]
        texts, counts = list(_texts(rows)), {}
        for name in config.tokenizers:
            tokenizer: Any = AutoTokenizer.from_pretrained(name)
            counts[name] = sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
            print(f"{counts[name]:>14,} tokens  {name}")  # noqa: T201
        return counts


def _texts(value: object) -> Iterator[str]:
    """Yield every text inside rows, those of messages included."""
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _texts(part)


@hookimpl
def register_commands(register: Register) -> None:
    """Register `tokens`."""
    register("tokens", Tokens)
