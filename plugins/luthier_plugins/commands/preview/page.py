"""A preview on the terminal and as a page that needs nothing but itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment
from rich.console import Console
from rich.text import Text

from luthier.errors import ConfigError, visible
from luthier_toolkits.terminal import SafeConsole

if TYPE_CHECKING:
    from luthier_plugins.commands.preview.previewing import Example, Part, PreviewResult
    from luthier_plugins.commands.preview.token_text import Piece

TRAINED, SPECIAL = "black on green", "magenta"
OPEN, CLOSE = "⟦", "⟧"
_ENDS = 200
"""Pieces of a long part that the terminal shows of its beginning, and of its end."""


def show(result: PreviewResult, console: Console | None = None) -> None:
    """Print `result`; where there is no colour, brackets mark what is trained."""
    console = console or SafeConsole()
    plain = console.no_color or console.color_system is None

    def put(*parts: str | Text | tuple[str, str]) -> None:
        console.print(Text.assemble(*map(_visible, parts)), soft_wrap=True)

    for example in result.examples:
        put((f"── {_heading(example)}", "bold"))
        for part in (example.prompt, *example.branches):
            put("\n", (part.label, "bold"), (f"  {part.count}", "dim"))
            tokens = _tokens(part, plain)
            # The sign of a last line end is enough.
            put(tokens[:-1] if tokens.plain.endswith("\n") else tokens)
        put("")
    coloured = (("trained", TRAINED), "  ", ("special token", SPECIAL))
    legend = (f"{OPEN}trained{CLOSE}",) if plain else coloured
    put(("legend    ", "bold"), *legend, "  ↵ line end  ⇥ tab")
    put(("model     ", "bold"), result.title)
    put(("data      ", "bold"), result.summary)
    if result.held_out:
        put(("held out  ", "bold"), result.held_out)
    for finding in result.findings:
        put((f"{finding.label:<10}", "bold red" if finding.wrong else "bold"), finding.text)
    if result.html:
        put(("page      ", "bold"), str(result.html))


def _visible(part: str | Text | tuple[str, str]) -> str | Text | tuple[str, str]:
    """Return a part without what moves the cursor; tokens are shown so already."""
    if isinstance(part, tuple):
        return visible(part[0]), part[1]
    return visible(part) if isinstance(part, str) else part


def write_page(result: PreviewResult, path: Path) -> None:
    """Write `result` to `path` as HTML with every text escaped: no script, nothing loaded from elsewhere.

    Raises:
        ConfigError: The file cannot be written.
    """
    template = (resources.files("luthier_plugins.commands.preview") / "preview.html.j2").read_text(
        encoding="utf-8"
    )
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(heading=_heading, tip=_tip)
    page = environment.from_string(template).render(result=result)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"html={path} cannot be written: {error.strerror}; give another file, or html=null for none"
        ) from error


def _heading(example: Example) -> str:
    """Return where an example comes from and the numbers that belong to it."""
    number = f"row {example.number:,}" if example.number else "example"
    values = [f"{name} {value:g}" for name, value in example.values.items()]
    return " · ".join(filter(None, (number, example.origin, *values)))


def _tip(piece: Piece) -> str:
    """Return position, ids and what happens to a piece."""
    last = piece.place + len(piece.ids) - 1
    where = f"token {piece.place}" if len(piece.ids) == 1 else f"tokens {piece.place}–{last}"
    ids = " ".join(map(str, piece.ids))
    return " · ".join(
        (where, f"id {ids}", "trained" if piece.trained else "not trained", *["special"] * piece.special)
    )


def _tokens(part: Part, plain: bool) -> Text:
    text = Text()
    for trained, run in itertools.groupby(
        _shortened(part.pieces), key=lambda piece: not isinstance(piece, str) and piece.trained
    ):
        text.append(OPEN if trained and plain else "")
        for piece in run:
            if isinstance(piece, str):
                text.append(piece, "dim")
            else:
                text.append(piece.text, "" if plain else _style(piece))
        text.append(CLOSE if trained and plain else "")
    return text


def _style(piece: Piece) -> str:
    if piece.trained:
        return f"{TRAINED} bold" if piece.special else TRAINED
    return SPECIAL if piece.special else ""


def _shortened(pieces: tuple[Piece, ...]) -> Iterator[Piece | str]:
    """Yield `pieces`, and of many only the beginning and the end."""
    left_out = pieces[_ENDS:-_ENDS] if len(pieces) > 2 * _ENDS else ()
    yield from pieces[:_ENDS] if left_out else pieces
    if left_out:
        yield f"\n[… {sum(len(piece.ids) for piece in left_out):,} tokens are only on the page …]\n"
        yield from pieces[-_ENDS:]
