"""What a contender is asked to do, what it answers, and the protocol between the two processes.

The parent writes a `Job` as JSON and starts ``python -m MODULE JOB.json``; the child trains and prints one
line, `MARK` followed by a `Measurement` as JSON. This module imports no torch, so the parent stays small.
"""

import json
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MARK = "MEASUREMENT "


@dataclass(frozen=True)
class Job:
    """One training run: the same for every contender but for `contender` and `precision`.

    `rows` is a JSONL file of ``{"prompt": messages, "completion": messages}``; `ids` is a JSON list of
    ``{"input_ids": [...], "prompt_length": n}`` in the same order, the ids that training must see.
    """

    contender: str
    precision: str
    model: str
    rows: str
    ids: str
    work: str
    batch_size: int = 4
    learning_rate: float = 1e-4
    clip_norm: float = 1.0
    rank: int = 16
    alpha: int = 32
    adapter: str = "lora"
    quantiser: str = "none"
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    threads: int = 2
    seed: int = 0

    def encoded(self) -> list[dict[str, Any]]:
        """Return the token ids and the prompt length of every row."""
        return json.loads(Path(self.ids).read_text())

    def step_tokens(self) -> list[int]:
        """Return the real, unpadded tokens of every optimiser step."""
        lengths = [len(row["input_ids"]) for row in self.encoded()]
        return [sum(lengths[i : i + self.batch_size]) for i in range(0, len(lengths), self.batch_size)]


@dataclass(frozen=True)
class Measurement:
    """What one run showed. Speed leaves out loading and the first step, which warms caches up."""

    contender: str
    precision: str
    tokens_per_second: float
    peak_rss_mb: float
    first_loss: float
    losses: list[float]
    tokens: int
    first_step_seconds: float
    later_seconds: float


def measure(job: Job, step_ends: list[float], losses: list[float]) -> Measurement:
    """Turn the time at which every step ended, in seconds since training began, into a `Measurement`."""
    tokens = job.step_tokens()
    if not len(tokens) == len(step_ends) == len(losses):
        raise ValueError(f"{len(tokens)} steps expected, {len(step_ends)} timed, {len(losses)} losses")
    later_seconds = step_ends[-1] - step_ends[0]
    return Measurement(
        contender=job.contender,
        precision=job.precision,
        tokens_per_second=sum(tokens[1:]) / later_seconds,
        peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        first_loss=losses[0],
        losses=losses,
        tokens=sum(tokens),
        first_step_seconds=step_ends[0],
        later_seconds=later_seconds,
    )


def answer(run: Callable[[Job], Measurement]) -> None:
    """Be the child: read the job that the command line names, run it, print the measurement."""
    fields = json.loads(Path(sys.argv[1]).read_text())
    job = Job(**{**fields, "targets": tuple(fields["targets"])})
    print(MARK + json.dumps(asdict(run(job))), flush=True)
