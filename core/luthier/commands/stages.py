"""The commands that must be done before a run: earlier stages, each in a process of its own."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from luthier.errors import ConfigError, LuthierError, unknown
from luthier.registry import composed_commands

ALONE = ("ACCELERATE_", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_")
"""What tells a process that it is one of several."""


class _StageError(LuthierError):
    """A stage that did not end well; its own process has said why."""


def do_stages(stages: Mapping[str, str]) -> None:
    """Run the commands of `stages` that are not done, in order; one that was stopped goes on.

    Args:
        stages: Name → a command line of luthier, e.g. ``train recipe=quickstart run_dir=FOLDER``.

    Raises:
        ConfigError: A command is none.
        LuthierError: One failed.
    """
    commands = {name: _command(name, line) for name, line in stages.items()}
    console = Console(highlight=False)
    for place, (name, words) in enumerate(commands.items(), 1):
        if _written(words):
            console.print(f"\n[bold]stage {place} of {len(commands)}, {name}[/] is done")
            continue
        console.print(
            f"\n[bold]stage {place} of {len(commands)}, {name}[/]: luthier {escape(shlex.join(words))}\n",
            soft_wrap=True,
        )
        if status := _run(words):
            error = _StageError(
                f"stages.{name} ended with status {status}; what is done stays done: repeat the command "
                "once it is mended"
            )
            error.status = status if status > 0 else 128 - status
            raise error


def _command(name: str, line: str) -> list[str]:
    try:
        words = shlex.split(str(line))
    except ValueError as error:
        raise ConfigError(f"stages.{name}: {error} in {line}") from error
    if not words or words[0] not in composed_commands():
        raise ConfigError(
            f"stages.{name}: {unknown('command', words[0] if words else '', composed_commands())}"
        )
    resumes = any(word.startswith("resume=") for word in words)
    return [*words, "resume=auto"] if words[0] == "train" and not resumes else words


def _written(words: list[str]) -> bool:
    """Whether a command that writes one file or folder has done so."""
    outs = [word.removeprefix("out=") for word in words if word.startswith("out=")]
    return bool(outs) and Path(outs[-1]).expanduser().exists()


def _run(words: list[str]) -> int:
    """Run one command and return its exit status; a signal to stop reaches it too."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ALONE)}
    process = subprocess.Popen([sys.executable, "-m", "luthier", *words], env=environment)

    def pass_on(number: int, frame: object) -> None:
        process.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # the terminal tells both: the stage saves a checkpoint first
                continue
    finally:
        signal.signal(signal.SIGTERM, before)
