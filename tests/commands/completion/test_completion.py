"""`completion`: candidates by hand, and TAB in a real bash."""

import os
import pty
import select
import shutil
import sys
import time

import pytest

from luthier.commands.cli import dispatch
from luthier.errors import LuthierError
from luthier_plugins.commands.completion.candidates import candidates


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("luthier pre", ["preview"]),
        ("luthier --v", ["--version"]),
        ("luthier plugins ", ["new"]),
        ("luthier completion ba", ["bash"]),
        ("luthier train adap", ["adapter="]),
        ("luthier train adapter=lo", ["adapter=lora"]),
        ("luthier train adapter=lora max_st", ["max_steps="]),
        ("luthier train evaluation.ev", ["evaluation.every="]),
        ("luthier train recipe=compare/q", ["recipe=compare/qlora"]),
        ("luthier train shuffle=", ["shuffle=false", "shuffle=true"]),
        ("luthier train data@eval", ["data@eval_data="]),
        ("luthier train data@eval_data=jso", ["data@eval_data=json", "data@eval_data=jsonl"]),
        ("luthier merge merger=ti", ["merger=ties"]),
        ("luthier fold adap", []),
        ("luthier nothing adap", []),
    ],
)
def test_what_a_word_may_become(line, expected):
    assert candidates(line) == expected


def test_a_shell_that_is_none_is_one_line():
    with pytest.raises(LuthierError, match="unknown shell 'tcsh': known: bash, fish, zsh"):
        dispatch(["completion", "tcsh"])


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("luthier prev", "preview "),
        ("luthier train adapt", "adapter="),
        ("luthier train adapter=lo", "adapter=lora "),
    ],
)
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_tab_completes_in_bash(typed, shown, tmp_path):
    """In an interactive shell of its own: script loaded, line typed, TAB pressed."""
    program = tmp_path / "luthier"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m luthier "$@"\n')
    program.chmod(0o755)
    child, terminal = pty.fork()
    if child == 0:
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        os.execvpe(
            "bash", ["bash", "--norc", "-i"], {**os.environ, "PATH": path, "TERM": "dumb", "PS1": "> "}
        )
    try:
        os.write(
            terminal,
            b'bind "set enable-bracketed-paste off"; eval "$(luthier completion bash)"; echo load""ed\n',
        )
        assert "loaded" in _read(terminal, "loaded")
        os.write(terminal, f"{typed}\t".encode())
        wanted = typed.rpartition(" ")[0] + " " + shown
        assert wanted in _read(terminal, wanted)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(terminal)


def _read(terminal: int, wanted: str) -> str:
    text, patience = "", time.monotonic() + 60
    while wanted not in text and time.monotonic() < patience:
        if select.select([terminal], [], [], 1)[0]:
            text += os.read(terminal, 4096).decode(errors="replace")
    return text
