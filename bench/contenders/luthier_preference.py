"""Luthier's DPO and KTO on the bench's rows, the reference pass timed apart from training."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bench.contenders.luthier_sft import trained
from bench.job import Job, Measurement, answer, measure
from luthier.commands import preparation


@contextmanager
def reference_timed() -> Iterator[list[float]]:
    """Yield the seconds that the reference passes of the block take, all that belongs to them included."""
    seconds: list[float] = []
    measured = preparation.measured_in_training

    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        found = measured(*arguments)
        seconds.append(time.perf_counter() - began)
        return found

    preparation.measured_in_training = timed
    try:
        yield seconds
    finally:
        preparation.measured_in_training = measured


def run(job: Job) -> Measurement:
    """Measure the reference and train."""
    with reference_timed() as reference:
        step_ends, losses = trained(job)
    if len(reference) != 1:
        raise RuntimeError(
            f"{len(reference)} reference passes were timed: has luthier.commands.preparation changed?"
        )
    return measure(job, step_ends, losses, reference_seconds=reference[0])


if __name__ == "__main__":
    answer(run)
