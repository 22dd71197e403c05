"""Luthier's SFT on the bench's rows, through the Python twin of ``luthier train``.

Configuration, metrics and the check of token ids serve every objective.
"""

import json
from pathlib import Path
from typing import Any

import torch

import luthier
from bench.job import Job, Measurement, answer, measure

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def overrides(job: Job) -> list[str]:
    """Return the job as command-line overrides."""
    return [
        f"model.path={job.model}",
        f"model.dtype={DTYPES[job.precision]}",
        f"quantiser={job.quantiser}",
        f"adapter={job.adapter}",
        f"adapter.rank={job.rank}",
        f"adapter.alpha={job.alpha}",
        "adapter.dropout=0",
        f"adapter.targets=[{','.join(job.targets)}]",
        f"objective={job.method}",
        *([] if job.method == "sft" else [f"objective.beta={job.beta}"]),
        "optimiser=adamw",
        f"optimiser.lr={job.learning_rate}",
        "optimiser.weight_decay=0",
        "schedule.name=constant",
        "schedule.warmup=0",
        "data=jsonl",
        f"data.path={job.rows}",
        f"batch_size={job.batch_size}",
        "pack_tokens=1536",
        f"epochs={job.epochs}",
        f"max_grad_norm={job.max_grad_norm}",
        "shuffle=false",
        f"seed={job.seed}",
        "log_every=1",
        "tracker=[metrics]",
        f"run_dir={job.work}",
    ]


def read_steps(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl that describe a training step."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry and "tokens_per_second" in entry]


def check_tokens(job: Job, steps: list[dict[str, Any]]) -> None:
    """Refuse a run that did not train on the same ids; `tokens` counts from the start of training."""
    expected, seen = job.shared_tokens(), steps[-1]["tokens"]
    if seen != expected:
        raise RuntimeError(f"Luthier trained on {seen} tokens, the rows hold {expected}: ids differ")


def trained(job: Job) -> tuple[list[float], list[float]]:
    """Train; return when every step ended, in seconds since training began, and its loss."""
    torch.set_num_threads(job.threads)
    result = luthier.train(luthier.compose("train", overrides(job)))
    steps = read_steps(Path(result.run_dir))
    check_tokens(job, steps)
    return [step["seconds"] for step in steps], [step["loss"] for step in steps]


def run(job: Job) -> Measurement:
    """Train one epoch."""
    return measure(job, *trained(job))


if __name__ == "__main__":
    answer(run)
