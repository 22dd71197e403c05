"""Start-up of commands, side by side with another version's: A B A B, medians.

    python -m bench.start --before PYTHON --rounds 5

PYTHON is the interpreter of an environment with the other version; without it, only this one is timed. The
time to the first step runs from the start of the process to the first line about a step, on a tiny model.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.killed import prepare

TINY = (
    "train model.path=base data=jsonl data.path=rows.jsonl model.dtype=float32 max_steps=1 log_every=1"
    " batch_size=4 run_dir={run}"
)
COMMANDS = {
    "--help": "--help",
    "train --help": "train --help",
    "plugins": "plugins",
    "a refusal": "train adapter=lroa data=jsonl data.path=rows.jsonl model.path=base",
    "first step": TINY,
    "whole run": TINY,
}
FIRST = "step 1/1"


def seconds(python: str, name: str, folder: Path, run: str) -> float:
    """Return how long a command takes, or until its first step is reported."""
    words = COMMANDS[name].format(run=run).split()
    start = time.perf_counter()
    with subprocess.Popen(
        [python, "-u", "-m", "luthier", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if name == "first step" and FIRST in line:
                taken = time.perf_counter() - start
                process.stdout.read()
                return taken
    return time.perf_counter() - start


def main() -> int:
    """Time everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--before", help="interpreter of the other version")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    versions = {"now": sys.executable, **({"before": options.before} if options.before else {})}
    folder = Path(tempfile.mkdtemp())
    prepare(folder)
    print(f"{'':14}" + "".join(f"{version:>10}" for version in versions) + f"{'ratio':>10}")
    for name in COMMANDS:
        taken: dict[str, list[float]] = {version: [] for version in versions}
        for number in range(options.rounds + 1):  # the first one fills the disk's cache
            for version, python in versions.items():
                taken[version].append(seconds(python, name, folder, f"{version}-{name.split()[0]}-{number}"))
        medians = [statistics.median(values[1:]) for values in taken.values()]
        ratio = f"{medians[-1] / medians[0]:9.2f}×" if len(medians) > 1 else ""
        print(f"{name:14}" + "".join(f"{median:8.2f} s" for median in medians) + ratio, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
