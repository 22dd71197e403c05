"""What `sample` returns and shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.box import SIMPLE
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from luthier.contracts import Selector
from luthier.evaluation import plain_text
from luthier_plugins.commands.sample.candidates import Answered
from luthier_plugins.commands.sample.statistics import Point, SampleStatistics
from luthier_toolkits.terminal import SafeConsole, counted, shown

NONE = {
    "pairs": ": no prompt has an answer that is good enough beside a worse one that came to an end; a larger "
    "n, a higher temperature, more max_new_tokens or gold=true may give some",
    "rows": ": no answer is good enough and came to an end; a larger n or more max_new_tokens may give some",
}
"""Why nothing was written."""


@dataclass(frozen=True)
class SampleResult:
    """What `sample` returns.

    Attributes:
        out: The file; None: what was asked on the command line was shown.
        prompts: How many prompts were answered.
        answers: How many answers were made.
        right: How many of them the source calls right.
        solved: Prompts with a right answer among theirs.
        written: Lines of the file.
        judged: Answers of which the source can tell.
        finished: Answers that came to an end by themselves.
        tokens: Tokens of all answers.
        curve: What choosing among 1, 2, 4 … answers gives.
    """

    out: Path | None
    prompts: int
    answers: int
    right: int
    solved: int
    written: int
    judged: int = 0
    finished: int = 0
    tokens: int = 0
    curve: list[Point] = field(default_factory=list)

    @classmethod
    def of(cls, counted: SampleStatistics, out: Path | None, selector: Selector) -> SampleResult:
        """Return the result that `counted` adds up to."""
        return cls(
            out, counted.prompts, counted.answers, counted.right, counted.solved, counted.written,
            counted.judged, counted.finished, counted.tokens, counted.points(selector),
        )  # fmt: skip


def show_result(result: SampleResult, what: str, picture: str | None) -> None:
    """Print what was sampled, and the curve where answers were chosen among."""
    console = SafeConsole()
    said = [f"{counted(result.prompts, 'prompt')} · {counted(result.answers, 'answer')}"]
    if result.judged:
        said[0] += f", {result.right / result.judged:.0%} right"
        said.append(f"{result.solved / result.prompts:.0%} of the prompts have a right one")
    said.append(f"{result.finished / result.answers:.0%} came to an end")
    said.append(f"{result.tokens / result.answers:,.0f} tokens each")
    console.print(" · ".join(said), soft_wrap=True)
    if len(result.curve) > 1:
        console.print(_table(result.curve))
    if result.out:
        why = "" if result.written else NONE.get(what, "")
        console.print(
            f"{counted(result.written, what.removesuffix('s'))} in {shown(result.out)}{why}", soft_wrap=True
        )
    if picture:
        console.print(f"score against N in {shown(picture)}", soft_wrap=True)


def _table(points: Sequence[Point]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("chosen among", justify="right")
    columns = {
        "mean score": [None if p.score is None else f"{p.score:.3f}" for p in points],
        "right": [None if p.right is None else f"{p.right:.1%}" for p in points],
        "KL at most": [None if p.divergence is None else f"{p.divergence:.2f} nats" for p in points],
    }
    complete = {name: cells for name, cells in columns.items() if None not in cells}
    for name in complete:
        table.add_column(name, justify="right")
    for row, point in enumerate(points):
        table.add_row(str(point.drawn), *(cells[row] for cells in complete.values()))
    return table


def show_answers(answered: Sequence[Answered]) -> None:
    """Print prompts with their answers, the chosen one marked."""
    console = SafeConsole()
    for answered_prompt in answered:
        console.print(f"[bold]{shown(plain_text(answered_prompt.row.fields['prompt']))}[/]")
        for place, candidate in enumerate(answered_prompt.candidates):
            parts = [f"{place + 1}"]
            if answered_prompt.scores is not None:
                parts.append(f"score {float(answered_prompt.scores[place]):.3f}")
            if not candidate.finished:
                parts.append("cut off")
            if place == answered_prompt.chosen and len(answered_prompt) > 1:
                parts.append("chosen")
            console.print(Text(" · ".join(parts), style="dim"))
            console.print(Padding(shown(candidate.completion), (0, 0, 0, 2)))
        console.print()
