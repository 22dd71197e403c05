"""LoRA over NF4 beside PEFT and bitsandbytes, memory of loading: ``python -m bench.quantise [--smoke]``.

The rows, model and options of ``bench.sft``, over NF4 with double quantisation; PEFT trains through TRL with
its compact head. The dense runs beside them say what NF4 costs. Then every way of loading the model in bf16,
each in a process of its own: the most it takes on the way, what stays, what the quantised layers store.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from bench import data, machine, report, sft
from bench.side_by_side import ROOT, environment, interleave

MODULES = {
    "trl-compact-nf4": sft.TRL,
    "luthier-nf4": sft.LUTHIER,
    "trl-compact": sft.TRL,
    "luthier": sft.LUTHIER,
    "luthier-int8": sft.LUTHIER,
}
REFERENCE = "trl-compact-nf4"
LOADED = ("luthier-bf16", "luthier-nf4", "luthier-int8", "transformers-nf4")
DENSE = LOADED[0]


def quantiser_of(contender: str) -> str:
    """Return the quantiser that a contender's name ends in, or ``none``."""
    last = contender.rpartition("-")[2]
    return last if last in ("nf4", "int8") else "none"


def load(how: str, model: str, threads: int) -> dict[str, float]:
    """Load the model in a process of its own and return what `bench.loading` measured."""
    command = [sys.executable, "-m", "bench.loading", how, model]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(threads), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{how} failed:\n{done.stderr}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def loading(model: str, rounds: int, threads: int) -> dict[str, str]:
    """Return a line for every way of loading: medians of the rounds, one way after the other in each."""
    runs = [{how: load(how, model, threads) for how in LOADED} for _ in range(rounds)]
    found = {how: {key: median(run[how][key] for run in runs) for key in runs[0][how]} for how in LOADED}
    dense = found[DENSE]
    return {
        f"loading, {how}": (
            f"peak {one['peak']:.0f} MiB ({one['peak'] / dense['kept']:.2f} of bf16), "
            f"kept {one['kept']:.0f} MiB ({one['kept'] / dense['kept']:.2f}), "
            f"quantised layers {one['layers']:.1f} MiB ({one['layers'] / dense['layers']:.3f}), "
            f"{one['seconds']:.1f} s"
        )
        for how, one in found.items()
    }


def main() -> int:
    """Measure, report, and return 1 if a contender failed."""
    options = sft.parse_options(__doc__, MODULES, list(MODULES)[:4])
    sft.prepare(options)
    with TemporaryDirectory() as work:
        planned = [
            replace(job, quantiser=quantiser_of(job.contender)) for job in sft.jobs(options, Path(work))
        ]
        outcome = interleave(planned, MODULES)
    if not outcome.measurements:
        return 1
    memory = loading(str(data.model_folder(options.smoke)), options.rounds, options.threads)
    measured = {measurement.contender for measurement in outcome.measurements}
    reference = REFERENCE if REFERENCE in measured else outcome.measurements[0].contender
    facts = sft.workload_facts(planned[0], options.rounds) | machine.describe() | memory
    facts |= {"ratios to": reference}
    summaries = report.summarise_all(outcome, reference)
    title = "LoRA r 16 on q, k, v, o over NF4"
    report.show(title, summaries)
    report.write(options.out / f"quantise-{machine.slug()}", title, facts, outcome, summaries)
    print(*(f"{what}: {told}" for what, told in memory.items()), sep="\n")
    return int(bool(outcome.failures))


if __name__ == "__main__":
    raise SystemExit(main())
