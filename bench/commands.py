"""Luthier's own commands, a fresh process each."""

import subprocess
import sys

from bench.side_by_side import ROOT, environment


def luthier(threads: int, *words: str) -> None:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "luthier", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(threads), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"luthier {' '.join(words)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
