"""SFT with LoRA, Luthier beside TRL: ``python -m bench.sft [--smoke]``.

LoRA of rank 16 on q, k, v and o of SmolLM2-135M, XSum rows in batches of 4, fused AdamW, one epoch. Speed is
real, unpadded tokens a second after the first step; every number is a median over rounds of fresh processes,
contender after contender.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

from bench import data, machine, report
from bench.job import Job
from bench.side_by_side import ROOT, environment, interleave

TRL, LUTHIER = "bench.peers.trl_sft", "bench.contenders.luthier_sft"
MODULES = {
    "trl-shipped": TRL,
    "trl-compact": TRL,
    "luthier": LUTHIER,
    "trl-shipped-checkpointing": TRL,
    "trl-compact-checkpointing": TRL,
}
REFERENCE = "trl-compact"
BATCH_SIZE = 4
LOSS_TOLERANCE = 1e-4


def parser_of(about: str | None, known: Iterable[str], chosen: list[str]) -> argparse.ArgumentParser:
    """Return the parser of a bench of `known` contenders, of which `chosen` run by default."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="processes of each contender and precision (3; smoke: 1)")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--contenders", nargs="+", choices=list(known), default=chosen)
    parser.add_argument("--rows", type=int, help="rows of one epoch, a multiple of 4 (64; smoke: 8)")
    parser.add_argument("--steps", type=int, help="stop after so many steps of 4 rows (default: all rows)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--out", type=Path, help="folder of the results (bench/results; smoke: bench/.cache)")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model and short rows, in seconds")
    return parser


def settle(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line and fill in what depends on other options."""
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.smoke else 3)
    options.rows = _rows_used(parser, options)
    options.out = options.out or (data.CACHE if options.smoke else ROOT / "bench/results")
    return options


def parse_options(about: str | None, known: Iterable[str], chosen: list[str]) -> argparse.Namespace:
    """Read the command line of a bench of `known` contenders, of which `chosen` run by default."""
    return settle(parser_of(about, known, chosen))


def _rows_used(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    rows = options.rows or (8 if options.smoke else 64)
    if options.steps:
        rows = min(rows, options.steps * BATCH_SIZE)
    if rows % BATCH_SIZE or rows < 2 * BATCH_SIZE:
        parser.error(f"--rows and --steps: {rows} rows are not two or more whole steps of {BATCH_SIZE}")
    return rows


def jobs(options: argparse.Namespace, work: Path) -> Iterator[Job]:
    """Yield the jobs, contender after contender within each round and precision."""
    rows, ids = data.workload_files(options.rows, options.smoke)
    for turn in range(options.rounds):
        for precision in options.precision:
            for contender in options.contenders:
                yield Job(
                    contender=contender,
                    precision=precision,
                    model=str(data.model_folder(options.smoke)),
                    rows=str(rows),
                    ids=str(ids),
                    work=str(work / f"{turn}-{precision}-{contender}"),
                    batch_size=BATCH_SIZE,
                    threads=options.threads,
                )


def workload_facts(job: Job, rounds: int) -> dict[str, str]:
    """Return what was measured, and where."""
    rows = job.encoded()
    prompt = mean(row["prompt_length"] for row in rows)
    whole = mean(len(row["input_ids"]) for row in rows)
    count = f"{len(rows) // job.completions} rows" + f" of {job.completions} completions" * (
        job.completions > 1
    )
    workload = f"{count}, mean prompt {prompt:.1f} and completion {whole - prompt:.1f} tokens"
    setting = (
        f"batch {job.batch_size}, {len(job.step_tokens())} steps, {rounds} rounds, {job.threads} threads"
    )
    return {
        "date": str(date.today()),
        "model": Path(job.model).name,
        "workload": workload,
        "setting": setting,
    }


def prepare(options: argparse.Namespace, module: str = "bench.data", *arguments: str) -> None:
    """Make model and rows in a process of their own, so that this one stays small."""
    command = [sys.executable, "-m", module, str(options.rows), *arguments] + ["--smoke"] * options.smoke
    env = environment(options.threads)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the workload could not be prepared:\n{done.stderr}")


def equality(spread: float | None) -> str:
    """Return the verdict on the contenders' losses of one step."""
    if spread is None:
        return "not compared"
    verdict = "agree" if spread <= LOSS_TOLERANCE else "DIFFER"
    return f"{verdict}, spread {spread:.1e}, allowed {LOSS_TOLERANCE:.0e}"


def main() -> int:
    """Measure, report, and return 1 if a contender failed or the first fp32 losses differ."""
    options = parse_options(__doc__, MODULES, list(MODULES)[:3])
    prepare(options)
    with TemporaryDirectory() as work:
        planned = list(jobs(options, Path(work)))
        outcome = interleave(planned, MODULES)
    if not outcome.measurements:
        return 1
    measured = {measurement.contender for measurement in outcome.measurements}
    reference = REFERENCE if REFERENCE in measured else outcome.measurements[0].contender
    spread = report.loss_spread(outcome)
    facts = workload_facts(planned[0], options.rounds) | machine.describe()
    facts |= {"ratios to": reference, "first fp32 losses": equality(spread)}
    summaries = report.summarise_all(outcome, reference)
    title = "SFT, LoRA r 16 on q, k, v, o"
    report.show(title, summaries)
    report.write(options.out / f"sft-{machine.slug()}", title, facts, outcome, summaries)
    print(f"first fp32 losses: {equality(spread)}")
    return int(bool(outcome.failures) or not (spread is None or spread <= LOSS_TOLERANCE))


if __name__ == "__main__":
    raise SystemExit(main())
