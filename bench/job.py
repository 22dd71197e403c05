"""What a contender is asked to do, what it answers, and the protocol between the two processes.

The parent writes a `Job` as JSON and starts ``python -m MODULE JOB.json``; the child trains and prints one
line, `MARK` followed by a `Measurement` (or another dataclass) as JSON. This module imports no torch, so the
parent stays small.
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

    `rows` is a JSONL file of rows as `method` takes them, such as ``{"prompt": messages, "completion":
    messages}``; `ids` is a JSON list of ``{"input_ids": [...], "prompt_length": n}`` in the same order, the
    ids that training must see; a row of several `completions` has an entry for each, one after the other.
    `start` is a PEFT folder of the weights an adapter starts from: those that Luthier draws from `seed`.
    """

    contender: str
    precision: str
    model: str
    rows: str
    ids: str
    work: str
    method: str = "sft"
    completions: int = 1
    epochs: int = 1
    batch_size: int = 4
    learning_rate: float = 1e-4
    max_grad_norm: float = 1.0
    rank: int = 16
    alpha: int = 32
    beta: float = 0.1
    adapter: str = "lora"
    start: str = ""
    quantiser: str = "none"
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    threads: int = 2
    seed: int = 0

    def encoded(self) -> list[dict[str, Any]]:
        """Return the token ids and the prompt length of every completion, with its prompt."""
        return json.loads(Path(self.ids).read_text())

    def step_tokens(self) -> list[int]:
        """Return the real, unpadded tokens of every optimiser step, a prompt counted for each completion."""
        lengths = [len(one["input_ids"]) for one in self.encoded()]
        size = self.batch_size * self.completions
        return [sum(lengths[i : i + size]) for i in range(0, len(lengths), size)] * self.epochs

    def shared_tokens(self) -> int:
        """Return the tokens of all steps where a prompt is counted once a row."""
        repeated = [one["prompt_length"] for n, one in enumerate(self.encoded()) if n % self.completions]
        return sum(self.step_tokens()) - self.epochs * sum(repeated)


@dataclass(frozen=True)
class Measurement:
    """What one run showed. Speed leaves out loading; `measure` says what else.

    `reference_seconds` is what a reference cost before training, if it was measured then.
    """

    contender: str
    precision: str
    tokens_per_second: float
    peak_rss_mb: float
    first_loss: float
    losses: list[float]
    tokens: int
    first_step_seconds: float
    later_seconds: float
    reference_seconds: float = 0.0

    @property
    def training_seconds(self) -> float:
        """Return the seconds of all steps."""
        return self.first_step_seconds + self.later_seconds


def measure(
    job: Job, step_ends: list[float], losses: list[float], reference_seconds: float | None = None
) -> Measurement:
    """Turn the time at which every step ended, in seconds since training began, into a `Measurement`.

    Speed leaves out the first step, which warms caches up. With `reference_seconds`, 0 where the reference is
    part of every step, it is that of the whole, the reference and the first step too.
    """
    tokens = job.step_tokens()
    if not len(tokens) == len(step_ends) == len(losses):
        raise ValueError(f"{len(tokens)} steps expected, {len(step_ends)} timed, {len(losses)} losses")
    later_seconds = step_ends[-1] - step_ends[0]
    if reference_seconds is None:
        speed = sum(tokens[1:]) / later_seconds
    else:
        speed = sum(tokens) / (reference_seconds + step_ends[-1])
    return Measurement(
        contender=job.contender,
        precision=job.precision,
        tokens_per_second=speed,
        peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        first_loss=losses[0],
        losses=losses,
        tokens=sum(tokens),
        first_step_seconds=step_ends[0],
        later_seconds=later_seconds,
        reference_seconds=reference_seconds or 0.0,
    )


def answer(run: Callable[[Job], Any]) -> None:
    """Be the child: read the job that the command line names, run it, print the dataclass it returns."""
    fields = json.loads(Path(sys.argv[1]).read_text())
    job = Job(**{**fields, "targets": tuple(fields["targets"])})
    print(MARK + json.dumps(asdict(run(job))), flush=True)
