"""`preview`: the examples of a training run as the model will see them, without the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from luthier import config as configs
from luthier.contracts import Objective
from luthier.data import training_rows
from luthier.errors import ConfigError
from luthier.models import load_model_tokenizer
from luthier.text import Codec
from luthier.trees import Branch, Tree
from luthier_plugins.commands.preview.token_text import Piece, pieces

CHECKED = 1000
"""Trees whose first and last tokens are looked at."""


@dataclass(frozen=True)
class Part:
    """The prompt, or one branch that continues it.

    Attributes:
        label: What it is.
        pieces: Its tokens, readable.
        tokens: How many.
        trained: How many of them are supervised.
    """

    label: str
    pieces: tuple[Piece, ...]
    tokens: int
    trained: int

    @property
    def count(self) -> str:
        """The line beside the label."""
        share = (
            f", {self.trained:,} trained ({100 * self.trained / self.tokens:.0f} %)" if self.trained else ""
        )
        return f"{self.tokens:,} token{'s' if self.tokens > 1 else ''}{share or ', none trained'}"


@dataclass(frozen=True)
class Example:
    """One tree.

    Attributes:
        number: Its place among the rows that are used, from 1; 0 if it is not of a data source.
        origin: ``file:line``.
        values: Numbers that belong to the tree.
        prompt: The root.
        branches: What continues it, one beside the other.
    """

    number: int
    origin: str
    values: dict[str, float]
    prompt: Part
    branches: tuple[Part, ...]

    @classmethod
    def of(cls, tree: Tree, tokenizer: Any, names: Sequence[str] = (), number: int = 0) -> Example:
        """Read `tree`; `names` say what its branches are."""
        no = [False] * len(tree.prompt)
        prompt = Part("prompt", pieces(tokenizer, tree.prompt, no), len(tree.prompt), 0)
        branches = []
        for place, branch in enumerate(tree.branches):
            scored = branch.scored or (True,) * len(branch.ids)
            plain = "completion" if len(tree.branches) == 1 else f"completion {place + 1}"
            label = names[place] if place < len(names) else plain
            read = pieces(tokenizer, branch.ids, scored, before=tree.prompt)
            branches.append(Part(label, read, len(branch.ids), sum(scored)))
        return cls(number, tree.origin, dict(tree.values), prompt, tuple(branches))


@dataclass(frozen=True)
class Finding:
    """Something to know about all examples.

    Attributes:
        label: What it is about.
        text: The line.
        wrong: It is most likely a mistake.
    """

    label: str
    text: str
    wrong: bool = False


@dataclass(frozen=True)
class PreviewResult:
    """What `preview` returns, and shows.

    Attributes:
        title: Model and methods.
        examples: The ones shown.
        rows: Rows that are used.
        summary: Rows, tokens, share supervised, rows dropped and why.
        held_out: The same of the held-out rows, if there are any.
        findings: What to know about where texts begin and end.
        html: The page that was written.
    """

    title: str
    examples: tuple[Example, ...]
    rows: int
    summary: str
    held_out: str | None = None
    findings: tuple[Finding, ...] = ()
    html: Path | None = None


def preview(config: DictConfig) -> PreviewResult:
    """Print the examples that `config` would train on, and write them as a page.

    Args:
        config: What `luthier.compose("preview", overrides)` returns.

    Raises:
        LuthierError: Something a person can mend; one line says what, where and how.
    """
    # The page and the terminal need libraries that a run does not.
    from luthier_plugins.commands.preview.page import show, write_page

    objective: Objective = configs.build("objective", config.objective)
    loaded = load_model_tokenizer(config.model)
    rows = training_rows(config, loaded, objective)
    data, held_out = rows.data, rows.held_out
    chosen = _choose(config, len(data))
    names = type(objective).branch_names
    first = [data.trees[i] for i in range(min(CHECKED, len(data)))]
    result = PreviewResult(
        title=f"{Path(loaded.name).name} · {config.objective.name} · {config.data.name}",
        examples=tuple(Example.of(data.trees[i], loaded.tokenizer, names, i + 1) for i in chosen),
        rows=len(data),
        summary=data.summary(),
        held_out=held_out[1].summary() if held_out else None,
        findings=findings(loaded.tokenizer, first, len(data)),
        html=Path(config.html).expanduser() if config.html else None,
    )
    if result.html:
        write_page(result, result.html)
    show(result)
    return result


def _choose(config: DictConfig, count: int) -> list[int]:
    """Return the places of the examples to show."""
    if wrong := [row for row in config.rows if not 1 <= row <= count]:
        raise ConfigError(f"rows={list(config.rows)}: there is no row {wrong[0]}; {count:,} rows are used")
    if config.rows:
        return [row - 1 for row in config.rows]
    if config.pick_seed is None:
        return list(range(min(config.examples, count)))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.pick_seed))
    return sorted(order[: config.examples].tolist())


def findings(tokenizer: Any, trees: Sequence[Tree], rows: int) -> tuple[Finding, ...]:
    """Return what `trees`, of `rows` in all, begin and end with."""
    among = "" if len(trees) == rows else f" (the first {len(trees):,} rows)"
    checks = (_beginning(tokenizer, trees), _end(tokenizer, trees))
    return tuple(Finding(finding.label, finding.text + among, finding.wrong) for finding in checks)


def _beginning(tokenizer: Any, trees: Sequence[Tree]) -> Finding:
    if tokenizer.bos_token is None:
        return Finding("begins", "the tokenizer has no begin token")
    times = Counter(_leading(tree.prompt, tokenizer.bos_token_id) for tree in trees)
    counts = ", ".join(_rows_start(count, number) for number, count in sorted(times.items()))
    text = f"begin token {tokenizer.bos_token!r}: {counts}"
    if max(times) < 2:
        return Finding("begins", text)
    return Finding("begins", f"{text}; most likely the template writes it and the tokenizer adds it", True)


def _rows_start(rows: int, times: int) -> str:
    many = {0: "none", 1: "one", 2: "two"}.get(times, str(times))
    return f"{rows:,} {'row starts' if rows == 1 else 'rows start'} with {many}"


def _end(tokenizer: Any, trees: Sequence[Tree]) -> Finding:
    branches = [branch for tree in trees for branch in tree.branches]
    last = Counter(_last_trained(tokenizer, branch) for branch in branches)
    # A turn's, by the chat template, and a text's, which may be another.
    ends = dict.fromkeys((Codec(tokenizer).turn_end, tokenizer.eos_token_id))
    counts = {end: count for end in ends if (count := last.pop(end, 0))} or dict.fromkeys(
        [next(iter(ends))], 0
    )
    names = " or ".join(repr(tokenizer.convert_ids_to_tokens(end)) for end in counts)
    text = f"end token {names} is trained in {sum(counts.values()):,} of {len(branches):,} completions"
    if not last:
        return Finding("ends", text)
    token = last.most_common(1)[0][0]
    other = "nothing" if token is None else repr(tokenizer.decode([token]))
    return Finding("ends", f"{text}; others train {other} last, and the model may not stop there", True)


def _leading(ids: Sequence[int], token: int | None) -> int:
    return next((place for place, token_id in enumerate(ids) if token_id != token), len(ids))


def _last_trained(tokenizer: Any, branch: Branch) -> int | None:
    """Return the last supervised token that is no white space, which templates write behind an end."""
    trained = [branch.ids[place] for place in reversed(branch.scored_places)]
    return next(
        (token_id for token_id in trained if tokenizer.decode([token_id]).strip()), next(iter(trained), None)
    )
