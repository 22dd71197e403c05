"""`completion`: candidates by hand, and TAB in real shells."""

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
        ("luthier train --cfg ", ["all", "hydra", "job"]),
        ("luthier train adapter=lora -c j", ["job"]),
        ("luthier train --cfg=j", ["--cfg=job"]),
        ("luthier train --config-dir ", []),
        ("luthier train -cd ", []),
        ("luthier train --package ", []),
        ("luthier train -p ", []),
        ("luthier train --config-dir my adapter=lo", ["adapter=lora"]),
        ("luthier train --config", ["--config-dir", "--config-dir="]),
        ("luthier nothing adap", []),
    ],
)
def test_what_a_word_may_become(line, expected):
    assert candidates(line) == expected


def test_a_shell_that_is_none_is_one_line():
    with pytest.raises(LuthierError, match="unknown shell 'tcsh': known: bash, fish, zsh"):
        dispatch(["completion", "tcsh"])


SHELLS = {
    "bash": (
        ["bash", "--norc", "-i"],
        'bind "set enable-bracketed-paste off"; eval "$(luthier completion bash)"',
    ),
    "zsh": (["zsh", "-f", "-i"], 'autoload -Uz compinit; compinit -u -D; eval "$(luthier completion zsh)"'),
    "fish": (["fish", "--no-config", "-i"], "luthier completion fish | source"),
}
"""How each is started without its user's settings, and what is typed to load its script."""


@pytest.mark.parametrize("shell", [pytest.param(name, id=name) for name in SHELLS])
@pytest.mark.parametrize(
    ("typed", "shown"),
    [("luthier prev", "iew"), ("luthier train adapt", "er="), ("luthier train adapter=lo", "ra")],
)
@pytest.mark.slow
def test_tab_completes(shell, typed, shown, tmp_path):
    """In an interactive shell of its own: script loaded, line typed, TAB pressed."""
    start, load = SHELLS[shell]
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    program = tmp_path / "luthier"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m luthier "$@"\n')
    program.chmod(0o755)
    (tmp_path / "lo.jsonl").touch()  # which no candidate may be mixed up with
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        own = {"PATH": path, "TERM": "dumb", "PS1": "> ", "HOME": str(tmp_path)}
        os.execvpe(start[0], start, {**os.environ, **own})
    try:
        os.write(terminal, f'{load}; echo load""ed\n'.encode())
        assert "loaded" in _read(terminal, "loaded")
        os.write(terminal, f"{typed}\t".encode())
        assert shown in _read(terminal, shown, echo=typed)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(terminal)


def _read(terminal: int, wanted: str, echo: str = "\0") -> str:
    """Read until `wanted` is shown, what was typed left out, for a minute at most."""
    text, patience = "", time.monotonic() + 60
    while wanted not in text.replace(echo, "") and time.monotonic() < patience:
        if select.select([terminal], [], [], 1)[0]:
            text += os.read(terminal, 4096).decode(errors="replace")
    return text.replace(echo, "")
