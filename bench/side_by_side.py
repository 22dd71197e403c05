"""Running contenders side by side: a fresh process each, A B A B, so that a noisy machine is noisy to all."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.job import MARK, Job, Measurement

ROOT = Path(__file__).parent.parent
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


@dataclass
class Outcome:
    """All measurements, in the order they were taken, and why a contender was dropped."""

    measurements: list[Measurement] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def of(self, contender: str, precision: str) -> list[Measurement]:
        """Return one contender's measurements in one precision, by round."""
        return [m for m in self.measurements if (m.contender, m.precision) == (contender, precision)]


def environment(threads: int) -> dict[str, str]:
    """Return a child's environment: offline, quiet, and a fixed number of threads."""
    # Modules are compiled once, as where people work.
    own = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return {**own, **QUIET, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def ask(module: str, job: Job) -> dict[str, Any]:
    """Run one job in a fresh process. Raises RuntimeError with the end of its output if it fails."""
    work = Path(job.work)
    work.mkdir(parents=True, exist_ok=True)
    job_file = work / "job.json"
    job_file.write_text(json.dumps(asdict(job)))
    command = [sys.executable, "-m", module, str(job_file)]
    env = environment(job.threads)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    answers = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not answers:
        raise RuntimeError("\n".join((done.stdout + done.stderr).splitlines()[-15:]))
    answer: dict[str, Any] = json.loads(answers[-1].removeprefix(MARK))
    return answer


def interleave(jobs: Iterable[Job], modules: Mapping[str, str]) -> Outcome:
    """Run every job in order, printing each measurement; a contender that fails once is dropped."""
    outcome = Outcome()
    for job in jobs:
        if job.contender in outcome.failures:
            continue
        try:
            measurement = Measurement(**ask(modules[job.contender], job))
        except RuntimeError as error:
            outcome.failures[job.contender] = str(error)
            print(f"{job.contender} {job.precision} failed:\n{error}", file=sys.stderr, flush=True)
            continue
        outcome.measurements.append(measurement)
        print(_line(measurement), flush=True)
    return outcome


def _line(m: Measurement) -> str:
    speed = f"{m.tokens_per_second:7.1f} tok/s  {m.peak_rss_mb:6.0f} MB"
    return f"{m.contender:<26}{m.precision}  {speed}  loss {m.first_loss:.6f} → {m.losses[-1]:.4f}"
