"""DPO and KTO with LoRA, Luthier beside TRL: ``python -m bench.preference [--smoke] [--method …] [--gate]``.

LoRA of rank 16 on q, k, v and o of SmolLM2-135M, 4 pairs a step (KTO: their 8 completions), the reference
included: speed is tokens a second over the reference and all steps, a pair counted as two full sequences (a
row of KTO as its own and its mismatched one), whatever a contender computes. ``--gate`` compares bf16 with
fp32 as well, see `bench.gate`; ``--gate only`` does nothing else.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from bench import gate, machine, preference_data, report, sft
from bench.job import Job
from bench.side_by_side import Outcome, interleave

TRL, LUTHIER = "bench.peers.trl_preference", "bench.contenders.luthier_preference"
MODULES = {
    "trl-shipped": TRL,
    "trl-compact": TRL,
    "trl-compact-precomputed": TRL,
    "luthier": LUTHIER,
}
LATER = 1
"""The step, counted from 0, whose loss is compared too: at the first one policy and reference are equal."""


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = sft.parser_of(__doc__, MODULES, [])
    parser.add_argument("--method", choices=preference_data.METHODS, default="dpo")
    parser.add_argument("--shape", choices=preference_data.SHAPES, default="long-prompts")
    parser.add_argument(
        "--epochs", type=int, default=1, help="the reference is measured once, where it can be"
    )
    parser.add_argument(
        "--gate", nargs="?", const="too", choices=("too", "only"), help="compare bf16 with fp32"
    )
    options = sft.settle(parser)
    if options.gate and options.method != "dpo":
        parser.error("--gate compares pairs: leave out --method")
    shared = options.method == "kto"  # where a precomputed reference is no part of the usual comparison
    options.contenders = options.contenders or [
        name for name in MODULES if not (shared and name.endswith("-precomputed"))
    ]
    return options


def jobs(options: argparse.Namespace, work: Path, adapter: str = "start") -> Iterator[Job]:
    """Yield the jobs, contender after contender within each round and precision."""
    rows, ids = preference_data.files(options.method, options.shape, options.rows, options.smoke)
    for job in sft.jobs(options, work):
        yield replace(
            job,
            rows=str(rows),
            ids=str(ids),
            method=options.method,
            completions=2,
            epochs=options.epochs,
            batch_size=sft.BATCH_SIZE * (2 if options.method == "kto" else 1),
            start=str(preference_data.adapter_folder(adapter, options.smoke)),
        )


def gate_jobs(options: argparse.Namespace, work: Path) -> Iterator[Job]:
    """Yield the jobs of the gate: both frameworks, both precisions, an adapter that has moved."""
    chosen = {"contenders": list(gate.MODULES), "precision": ["fp32", "bf16"], "rounds": 1, "epochs": 1}
    return jobs(argparse.Namespace(**{**vars(options), **chosen}), work / "gate", "moved")


def phases(outcome: Outcome, epochs: int) -> dict[str, str]:
    """Return how time divides into the reference and training, where they are apart."""
    facts = {}
    for contender, precision in dict.fromkeys((m.contender, m.precision) for m in outcome.measurements):
        runs = outcome.of(contender, precision)
        reference = median(run.reference_seconds for run in runs)
        if reference:
            training, tokens = median(run.training_seconds for run in runs), runs[0].tokens
            facts[f"{contender}, {precision}"] = (
                f"reference {reference:.1f} s ({tokens / epochs / reference:.0f} tok/s), "
                f"training {training:.1f} s ({tokens / training:.0f} tok/s)"
            )
    return facts


def later_losses(outcome: Outcome) -> str:
    """Return every contender's loss at the second step."""
    cases = dict.fromkeys((m.contender, m.precision) for m in outcome.measurements)
    return ", ".join(f"{c} {p} {outcome.of(c, p)[0].losses[LATER]:.6f}" for c, p in cases)


def agree(outcome: Outcome) -> tuple[dict[str, str], bool]:
    """Return whether fp32 losses agree at the first and at the second step, in words and as a whole."""
    spreads = {"first": report.loss_spread(outcome), "second": report.loss_spread(outcome, step=LATER)}
    facts = {f"{name} fp32 losses": sft.equality(spread) for name, spread in spreads.items()}
    whole = all(spread is None or spread <= sft.LOSS_TOLERANCE for spread in spreads.values())
    return facts, whole


def main() -> int:
    """Measure, report, and return 1 if a contender failed, fp32 losses differ or the gate is not passed.

    With a tiny random model the gate only has to run.
    """
    options = parse_options()
    sft.prepare(options, "bench.preference_data", options.method, options.shape)
    verdict, outcome = None, Outcome()
    with TemporaryDirectory() as work:
        planned = list(jobs(options, Path(work)))
        if options.gate != "only":
            outcome = interleave(planned, MODULES)
        if options.gate:
            verdict = gate.gate(gate_jobs(options, Path(work)))
    measured = [measurement.contender for measurement in outcome.measurements]
    reference = sft.REFERENCE if sft.REFERENCE in measured else (measured or ["none"])[0]
    agreement, agreed = agree(outcome)
    told = phases(outcome, options.epochs) | (verdict.facts if verdict else {})
    if measured:
        told |= {"ratios to": reference, "second losses": later_losses(outcome), **agreement}
    facts = sft.workload_facts(planned[0], options.rounds) | machine.describe() | told
    summaries = report.summarise_all(outcome, reference)
    parts = [f"{options.epochs}-epochs"] * (options.epochs > 1) + ["gate"] * (options.gate == "only")
    stem = "-".join(["preference", options.method, options.shape, *parts, machine.slug()])
    title = f"{options.method.upper()}, {options.shape}, {options.epochs} epoch(s), LoRA r 16 on q, k, v, o"
    if summaries:
        report.show(title, summaries)
    details = {"gate": verdict.details} if verdict else {}
    report.write(options.out / stem, title, facts, outcome, summaries, details)
    print(*(f"{what}: {one}" for what, one in told.items()), sep="\n")
    gated = not options.gate or (verdict is not None and (verdict.passed or options.smoke))
    complete = bool(measured) or options.gate == "only"
    return int(bool(outcome.failures) or not (complete and agreed and gated))


if __name__ == "__main__":
    raise SystemExit(main())
