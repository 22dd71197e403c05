"""`sample`: answers to the prompts of rows, scored by the rows' source, as candidates, pairs or rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track

from luthier import config as configs
from luthier.codec import Codec
from luthier.data import read
from luthier.data_source import DataSource, Row
from luthier.errors import ConfigError, DataError, unknown
from luthier.evaluation import plain_text
from luthier.generation import Answer, Decoding, answers
from luthier.model import load_model
from luthier.model_policy import policy_of

WRITES = ("candidates", "pairs", "rows")


@dataclass(frozen=True)
class SampleResult:
    """What `sample` returns and shows.

    Attributes:
        out: The file.
        prompts: How many prompts were answered.
        answers: How many answers were made.
        right: How many of them the source calls right.
        solved: Prompts with a right answer among theirs.
        written: Lines of the file.
    """

    out: Path
    prompts: int
    answers: int
    right: int
    solved: int
    written: int


@dataclass(frozen=True)
class _Scored:
    answer: Answer
    score: float | None

    @property
    def right(self) -> bool:
        return self.answer.finished and self.score is not None and self.score >= 1.0


def sample(config: DictConfig) -> SampleResult:
    """Answer the prompts of `config.data` and write what `config.write` says, one JSON object a line.

    Raises:
        LuthierError: Something a person can mend; one line says what, where and how.
    """
    out, decoding = _checked(config)
    quantiser = configs.build("quantiser", config.quantiser) if config.quantiser else None
    source: DataSource = configs.build("data_source", config.data)
    loaded = load_model(config.model, train_base=False, quantiser=quantiser)
    codec = Codec(loaded.tokenizer)
    rows = _rows(config, source, codec)
    prompts = [codec.prompt_ids(row.fields["prompt"], row.origin, row.fields.get("tools")) for row in rows]
    policy = policy_of(loaded, config.model.fused)
    found: dict[int, list[_Scored]] = {}
    console = Console(stderr=True)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        made = answers(policy, codec, prompts, decoding)
        for place, own in track(made, "answers", len(rows), console=console, transient=True):
            found[place] = [_Scored(one, source.verify(rows[place], one.text)) for one in own]
            if config.write != "candidates" and all(one.score is None for one in found[place]):
                where = rows[place].origin
                raise DataError(f"{where}: nothing says which answers are right: set write=candidates")
    lines = [line for place, row in enumerate(rows) for line in _lines(config, row, found[place])]
    _write(out, lines)
    result = _result(out, list(found.values()), len(lines))
    _show(result, config.write)
    return result


def _checked(config: DictConfig) -> tuple[Path, Decoding]:
    if config.write not in WRITES:
        raise ConfigError(unknown("write", str(config.write), WRITES))
    for key in ("n", "temperature", "max_new_tokens", "batch_size", "pairs_each"):
        if not config[key] > 0:
            raise ConfigError(f"{key}={config[key]} must be positive")
    if not 0 < config.top_p <= 1:
        raise ConfigError(f"top_p={config.top_p} must be in (0, 1]")
    out = Path(config.out).expanduser()
    if out.exists():
        raise ConfigError(f"out={out} is there already; choose another file, or remove it")
    _write(out, [])  # now rather than after the work
    out.unlink()
    decoding = Decoding(config.max_new_tokens, config.batch_size, config.n, config.temperature, config.top_p)
    return out, decoding


def _rows(config: DictConfig, source: DataSource, codec: Codec) -> list[Row]:
    filters = [configs.build("row_filter", node) for node in (config.get("row_filters") or {}).values()]
    rows = list(read(source, codec.has_template, filters, dropped=Counter()))
    if not rows:
        raise DataError("the data holds no row to answer")
    for row in rows:
        if row.fields.get("prompt") is None:
            has = ", ".join(row.fields) or "nothing"
            raise DataError(f"{row.origin}: has {has}; an answer needs 'prompt'; rename with data.columns")
    return rows


def _lines(config: DictConfig, row: Row, found: Sequence[_Scored]) -> Iterator[dict[str, Any]]:
    """Yield what is written of a row's answers; equal texts count once in pairs and rows."""
    prompt = row.fields["prompt"]
    if config.write == "candidates":
        for one in found:
            yield {"prompt": prompt, "completion": _spoken(prompt, one.answer.text), "score": one.score,
                   "finished": one.answer.finished, "origin": row.origin}  # fmt: skip
        return
    right = list(dict.fromkeys(one.answer.text for one in found if one.right))
    own = row.fields.get("completion")
    if not right and config.gold and own is not None:
        right = [plain_text(own).strip()]
    expected = {} if own is None else {"answer": plain_text(own).strip()}
    if config.write == "rows":
        for text in right[:1]:
            yield {"prompt": prompt, "completion": _spoken(prompt, text), **expected}
        return
    wrong = dict.fromkeys(one.answer.text for one in found if one.score is not None and one.score < 1.0)
    usable = [text for text in wrong if text and text not in right]
    for chosen, rejected in list(zip(right, usable, strict=False))[: config.pairs_each]:
        yield {"prompt": prompt, "chosen": _spoken(prompt, chosen), "rejected": _spoken(prompt, rejected),
               **expected}  # fmt: skip


def _spoken(prompt: Any, text: str) -> Any:
    """Return an answer in the form of its prompt: messages after messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _write(out: Path, lines: Sequence[dict[str, Any]]) -> None:
    draft = out.with_name(out.name + ".part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(
            "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines),
            encoding="utf-8",
        )
        draft.replace(out)
    except OSError as error:
        raise ConfigError(f"out={out} cannot be written: {error.strerror}") from error


def _result(out: Path, found: Sequence[Sequence[_Scored]], written: int) -> SampleResult:
    return SampleResult(
        out=out,
        prompts=len(found),
        answers=sum(map(len, found)),
        right=sum(one.right for own in found for one in own),
        solved=sum(any(one.right for one in own) for own in found),
        written=written,
    )


def _show(result: SampleResult, what: str) -> None:
    share, solved = result.right / result.answers, result.solved / result.prompts
    Console(highlight=False).print(
        f"{result.prompts:,} prompts · {result.answers:,} answers, {share:.0%} right · "
        f"{solved:.0%} of the prompts have a right one\n{result.written:,} {what} in {result.out}",
        soft_wrap=True,
    )
