"""A DoRA step beside a LoRA step, in Luthier and in PEFT: ``python -m bench.adapters [--smoke]``.

The rows, model and options of ``bench.sft``, adapters of rank 16 on q, k, v and o; PEFT trains through TRL
with its compact head. What counts is the ratio of DoRA to LoRA within each framework: time of a step, peak
memory.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from bench import machine, report, sft
from bench.side_by_side import Outcome, interleave

MODULES = {
    "luthier-lora": sft.LUTHIER,
    "luthier-dora": sft.LUTHIER,
    "peft-lora": sft.TRL,
    "peft-dora": sft.TRL,
}


def lora_of(contender: str) -> str:
    """Return the contender that `contender` is compared with: LoRA in the same framework."""
    return contender.partition("-")[0] + "-lora"


def ratios(outcome: Outcome, precisions: list[str]) -> Iterator[tuple[str, str]]:
    """Yield what a DoRA step costs, LoRA's being 1, for every framework and precision measured."""
    for contender in (name for name in MODULES if name.endswith("-dora")):
        for precision in precisions:
            runs, others = outcome.of(contender, precision), outcome.of(lora_of(contender), precision)
            pairs = list(zip(runs, others, strict=False))
            if pairs:
                times = [b.tokens_per_second / a.tokens_per_second for a, b in pairs]
                memory = median(a.peak_rss_mb / b.peak_rss_mb for a, b in pairs)
                told = f"time {median(times):.3f} ({min(times):.3f}–{max(times):.3f}), peak RSS {memory:.3f}"
                yield f"{contender} / {lora_of(contender)}, {precision}", told


def main() -> int:
    """Measure, report, and return 1 if a contender failed or the first fp32 losses differ."""
    options = sft.parse_options(__doc__, MODULES, list(MODULES))
    sft.prepare(options)
    with TemporaryDirectory() as work:
        planned = [
            replace(job, adapter=job.contender.partition("-")[2]) for job in sft.jobs(options, Path(work))
        ]
        outcome = interleave(planned, MODULES)
    if not outcome.measurements:
        return 1
    spread = report.loss_spread(outcome)
    told = dict(ratios(outcome, options.precision))
    facts = sft.workload_facts(planned[0], options.rounds) | machine.describe() | told
    facts |= {"ratios to": "LoRA in the same framework", "first fp32 losses": sft.equality(spread)}
    cases = dict.fromkeys((m.contender, m.precision) for m in outcome.measurements)
    summaries = [report.summarise(outcome, c, p, lora_of(c)) for c, p in cases if outcome.of(lora_of(c), p)]
    title = "DoRA beside LoRA, r 16 on q, k, v, o"
    report.show(title, summaries)
    report.write(options.out / f"adapters-{machine.slug()}", title, facts, outcome, summaries)
    print(*(f"{what}: {told}" for what, told in told.items()), sep="\n")
    print(f"first fp32 losses: {sft.equality(spread)}")
    return int(bool(outcome.failures) or not (spread is None or spread <= sft.LOSS_TOLERANCE))


if __name__ == "__main__":
    raise SystemExit(main())
