"""What others wrote is shown as it is: in errors, in the log, in tables and on every command's page."""

import io
import logging
import re
import unicodedata
from pathlib import Path

import pytest
from rich.table import Table

import luthier_plugins
from luthier.errors import LONGEST, DataError, UnusableRowError, visible
from luthier_toolkits.terminal import SafeConsole, shown

PLAIN = re.compile(r"(?<!Safe)\bConsole\(")
EVIL = {
    "clear": ("a\x1b[2Jb", r"a\x1b[2Jb"),
    "title": ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
    "c1": ("\x9b31m", r"\x9b31m"),
    "carriage": ("ok\rno", r"ok\rno"),
    "backspace": ("ab\x08\x08", r"ab\x08\x08"),
    "surrogate": ("caf\udce9", r"caf\udce9"),
    "bidi": ("\u202etxt.exe\u202c", r"\u202etxt.exe\u202c"),
    "isolate": ("\u2066x\u2069", r"\u2066x\u2069"),
    "tags": ("x\U000e0041", r"x\U000e0041"),
    "zero": ("a\u200bb\ufeff\x00", r"a\u200bb\ufeff\x00"),
    "delete": ("\x7f", r"\x7f"),
}


@pytest.mark.parametrize(("text", "seen"), EVIL.values(), ids=EVIL)
def test_d5_what_moves_a_cursor_or_hides_text_is_seen(text, seen):
    assert visible(text) == seen
    assert visible(visible(text)) == seen
    seen.encode()  # can be printed


@pytest.mark.parametrize("text", ["naïve 日本語", "👩\u200d👧", "a\tb\nc", "[q_proj]", "می\u200cخواهم", "�"])
def test_other_text_stays(text):
    assert visible(text) == text


@pytest.mark.parametrize("size", [LONGEST, LONGEST + 1, 800_000])
def test_d5_no_message_is_longer_than_a_screen(size):
    text = "".join(chr(97 + place % 26) for place in range(size))
    said = visible(text)
    assert len(said) <= LONGEST
    assert visible(said) == said
    if size > LONGEST:
        head, _, tail = said.partition(" … ")
        left, _, tail = tail.partition(" characters left out … ")
        assert text.startswith(head)
        assert text.endswith(tail)
        assert len(head) + int(left.replace(",", "")) + len(tail) == size
    assert len(visible("\x1b" * size)) <= LONGEST


@pytest.mark.parametrize(("text", "seen"), EVIL.values(), ids=EVIL)
def test_d5_errors_and_the_log_show_it(text, seen, caplog):
    one_line = " ".join(text.splitlines())
    assert (seen if one_line == text else one_line) in str(DataError(f"row {text}"))
    assert "\n" not in str(DataError(f"row\n{text}\u2028x"))
    assert UnusableRowError("f:1", text).reason == seen
    with caplog.at_level(logging.WARNING, "luthier"):
        logging.getLogger("luthier").warning("%s and %d", text, 3)
    assert caplog.messages == [f"{seen} and 3"]


def printed(*things, width=400):
    file = io.StringIO()
    console = SafeConsole(file=file, width=width, force_terminal=True, color_system="truecolor")
    for thing in things:
        console.print(thing)
    return file.getvalue()


@pytest.mark.parametrize(("text", "seen"), EVIL.values(), ids=EVIL)
def test_d5_lines_and_tables_show_it_and_keep_their_own_styles(text, seen):
    table = Table("name", title=text)
    table.add_row(shown(f"[q_proj] {text}"))
    table.add_row(text.replace("[", "("))  # of a command that forgot
    out = printed(f"[bold]{shown(text)}[/]", table)
    assert out.count(seen) >= 2
    assert "[q_proj]" in out
    assert "\x1b[1m" in out
    plain = out.replace("\x1b[1m", "").replace("\x1b[0m", "").replace("\x1b[3m", "").replace("\x1b[1;3m", "")
    assert {c for c in plain if unicodedata.category(c) in ("Cc", "Cf", "Cs")} <= {"\n"}


def test_d5_no_command_makes_a_console_that_passes_everything_on():
    plugins = Path(luthier_plugins.__file__).parent
    plain = {
        str(path.relative_to(plugins)) for path in plugins.rglob("*.py") if PLAIN.search(path.read_text())
    }
    assert plain == set()
