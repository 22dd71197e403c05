"""The commands that must be done before a run: earlier stages, each in a process of its own."""

from __future__ import annotations

import glob
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from luthier.commands.positionals import parsed
from luthier.errors import ConfigError, LuthierError, unknown, visible
from luthier.registry import command, composed_commands
from luthier.runs import finished, supervised

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
        title = f"\n[bold]stage {place} of {len(commands)}, {escape(visible(name))}[/]"
        if _done(words):
            console.print(f"{title} is done")
            continue
        console.print(f"{title}: luthier {escape(visible(str(stages[name])))}\n", soft_wrap=True)
        if status := _run(words):
            error = _StageError(
                f"stages.{name} ended with status {status}; what is done stays done: repeat the command "
                "once it is mended"
            )
            error.status = status if status > 0 else 128 - status
            raise error


def _command(name: str, line: str) -> list[str]:
    try:
        verb, *words = shlex.split(str(line)) or [""]
    except ValueError as error:
        raise ConfigError(f"stages.{name}: {error} in {line}") from error
    if verb not in composed_commands():
        raise ConfigError(f"stages.{name}: {unknown('command', verb, composed_commands())}")
    resumes = hasattr(command(verb).options, "resume") and not any(w.startswith("resume=") for w in words)
    return [verb, *words, *(["resume=auto"] if resumes else [])]


def _done(words: list[str]) -> bool:
    """Whether a command that cannot be resumed has written its file or folder.

    Until then it has ``OUT.part*`` beside it.
    """
    verb, *typed = words
    pairs = (word.partition("=") for word in parsed(verb, command(verb), typed).overrides)
    given = {key: Path(value.strip("'\"")).expanduser() for key, _, value in pairs}
    if "out" in given:
        out = given["out"]
        empty = out.is_dir() and not any(out.iterdir())
        return out.exists() and not empty and not any(out.parent.glob(f"{glob.escape(out.name)}.part*"))
    return "resume" not in given and "run_dir" in given and finished(given["run_dir"]) is not None


def _run(words: list[str]) -> int:
    """Run one command and return its exit status; a signal to stop reaches it too."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ALONE)}
    command = [sys.executable, "-P", "-m", "luthier", *words]  # nothing of the working folder is imported
    return supervised(lambda: subprocess.Popen(command, env=environment), lambda stage: stage.wait())[0]
