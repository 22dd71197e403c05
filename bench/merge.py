"""Merging beside mergekit, whole commands: ``python -m bench.merge [--smoke] [--big]``.

Three copies of SmolLM2-135M in fp32, whose matrices have moved by 1 %, merged four ways by ``luthier merge``
and by ``mergekit-yaml``, a fresh process each, A B A B. What counts is the time of the whole command, imports
included, and the most anonymous memory. ``--big`` merges copies of a random Llama of 3.2 billion parameters
in bf16: Luthier alone, or with ``--peer`` mergekit too.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from bench import data, machine, merge_commands
from bench.merge_commands import CONTENDERS, FLAGS, LUTHIER, models_of
from bench.side_by_side import ROOT, environment
from bench.watching import Disk, Watched, forget, measure_disk, watch

REFERENCE = "mergekit"
COMPARED = ("linear", "ties")
"""Merges that draw nothing at random."""
COLUMNS = (
    "merge", "contender", "s", "min–max", "times as fast", "on the disk, s", "RssAnon MB", "RSS MB", "MB/s",
    "disk's share",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One merge; `read` and `written` are bytes of weights."""

    merge: str
    contender: str
    took: Watched
    read: int
    written: int


@dataclass
class Outcome:
    """All runs in the order they were taken, why a contender was dropped, how far two results are apart."""

    runs: list[Run] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    apart: dict[str, dict[str, float]] = field(default_factory=dict)

    def of(self, merge: str, contender: str) -> list[Run]:
        """Return a contender's runs of one merge, by round."""
        return [run for run in self.runs if (run.merge, run.contender) == (merge, contender)]


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--big", action="store_true", help="the big model; TIES and DARE by Luthier alone")
    parser.add_argument("--peer", action="store_true", help="with --big: by mergekit too, which takes long")
    parser.add_argument("--merges", nargs="+", choices=LUTHIER)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS)
    parser.add_argument("--repeats", type=int, help="rounds (default: 3; --big and --smoke: 1)")
    parser.add_argument("--count", type=int, choices=(2, 3), help="models merged (default: 3; --big: 2)")
    parser.add_argument("--max-memory", type=float, help="Luthier's, in GiB (default: 0.5; --big: 1.8)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--work", type=Path, help="folder in which the models are made, and deleted")
    parser.add_argument("--out", type=Path, help="folder of the results (bench/results; smoke: bench/.cache)")
    parser.add_argument("--smoke", action="store_true", help="tiny models: does everything still run?")
    options = parser.parse_args()
    known = ([REFERENCE] * options.peer + ["luthier"]) if options.big else list(CONTENDERS)
    options.contenders = options.contenders or known
    options.merges = options.merges or (["ties", "dare-linear"] if options.big else list(LUTHIER))
    options.repeats = options.repeats or (1 if options.big or options.smoke else 3)
    options.count = options.count or (2 if options.big else 3)
    options.max_memory = options.max_memory or (1.8 if options.big else 0.5)
    options.out = options.out or (data.CACHE if options.smoke else ROOT / "bench/results")
    return options


def child(module: str, *words: str, threads: int) -> str:
    """Run a module of the bench in a process of its own, so that this one stays small; return its output."""
    command = [sys.executable, "-m", module, *words]
    env = environment(threads)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{module} failed:\n{done.stderr}")
    return done.stdout


def weights(folder: Path) -> list[Path]:
    """Return a folder's files of weights."""
    return sorted(folder.glob("*.safetensors"))


def merge(name: str, contender: str, work: Path, options: argparse.Namespace) -> tuple[Run, Path]:
    """Run one merge; return with it where the result is."""
    out = work / "out" / contender
    if contender == "luthier":
        command = merge_commands.luthier(name, work, out, options.count, options.max_memory)
        result = out / "model"
    else:
        flags = FLAGS[contender]
        command = merge_commands.mergekit(name, work, out, options.count, flags, options.big)
        result = out
    inputs = [file for label in models_of(name, options.count) for file in weights(work / label)]
    if options.big:
        forget(inputs)
    took = watch(command, ROOT, environment(options.threads))
    read, written = (sum(file.stat().st_size for file in files) for files in (inputs, weights(result)))
    return Run(name, contender, took, read, written), result


def measure(work: Path, options: argparse.Namespace) -> Outcome:
    """Merge contender after contender within each round; one that fails once is dropped."""
    outcome = Outcome()
    for name in options.merges * options.repeats:
        results: dict[str, str] = {}
        for contender in options.contenders:
            if contender in outcome.failures:
                continue
            try:
                run, result = merge(name, contender, work, options)
            except RuntimeError as error:
                outcome.failures[contender] = str(error)
                print(f"{contender}, {name}, failed:\n{error}", file=sys.stderr, flush=True)
                continue
            outcome.runs.append(run)
            results[contender] = str(result)
            print(
                f"{name:<13}{contender:<16}{run.took.seconds:7.1f} s  {run.took.anonymous_mb:6.0f} MB",
                flush=True,
            )
        if name in COMPARED and name not in outcome.apart and {REFERENCE, "luthier"} <= results.keys():
            pair = results["luthier"], results[REFERENCE]
            outcome.apart[name] = json.loads(child("bench.same_weights", *pair, threads=options.threads))
        shutil.rmtree(work / "out", ignore_errors=True)
    return outcome


def rows(outcome: Outcome, disk: Disk) -> list[tuple[str, ...]]:
    """Return the rows of the table, in the order of `COLUMNS`: medians, and ratios within each round."""
    found: list[tuple[str, ...]] = []
    for name, contender in dict.fromkeys((run.merge, run.contender) for run in outcome.runs):
        runs, others = outcome.of(name, contender), outcome.of(name, REFERENCE)
        seconds = [run.took.seconds for run in runs]
        ratios = [b.took.seconds / a.took.seconds for a, b in zip(runs, others, strict=False)]
        moved = runs[0].read + runs[0].written
        faster = f"{median(ratios):.2f}× ({min(ratios):.2f}–{max(ratios):.2f})" if ratios else "–"
        found.append((
            name, contender, f"{median(seconds):.1f}", f"{min(seconds):.1f}–{max(seconds):.1f}", faster,
            f"{median(run.took.seconds + run.took.sync_seconds for run in runs):.1f}",
            f"{max(run.took.anonymous_mb for run in runs):.0f}",
            f"{max(run.took.resident_mb for run in runs):.0f}",
            f"{moved / median(seconds) / 1e6:.0f}",
            f"{disk.seconds(runs[0].read, runs[0].written) / median(seconds):.0%}",
        ))  # fmt: skip
    return found


def facts_of(options: argparse.Namespace, outcome: Outcome, disk: Disk) -> dict[str, str]:
    """Return what was measured, where and with what."""
    shape = "a random Llama of 3.2 B, bf16, read from the disk" if options.big else "SmolLM2-135M, fp32"
    facts = {
        "date": str(date.today()),
        "models": f"{options.count} copies of {shape}, matrices moved by 1 %",
        "setting": f"{options.repeats} rounds, {options.threads} threads",
        "Luthier's max_memory": f"{options.max_memory} GiB",
        "disk": f"{disk.read / 1e6:.0f} MB/s read, {disk.write / 1e6:.0f} MB/s written, in sequence",
        "on the disk": "the command and a sync after it; Luthier syncs in the command",
        "disk's share": "what reading the models and writing the result take at those speeds, of the time",
    }
    facts |= {name: " ".join(["mergekit-yaml", *flags]) for name, flags in FLAGS.items()}
    for name, far in outcome.apart.items():
        facts[f"{name}, Luthier and mergekit"] = (
            f"at most {far['furthest']:.1e} apart, by more than 1e-6 in {far['apart']:.1e} of the elements"
        )
    return facts | machine.describe() | {"mergekit version": version("mergekit")}


def report(options: argparse.Namespace, outcome: Outcome, disk: Disk) -> None:
    """Print the table, and write it and everything else."""
    title = "Merging" + ", the big model" * options.big
    lines = rows(outcome, disk)
    table = Table(title=title)
    for column in COLUMNS:
        table.add_column(column, no_wrap=True)
    for line in lines:
        table.add_row(*line)
    Console(width=max(Console().width, 150)).print(table)
    facts = facts_of(options, outcome, disk)
    text = ["| " + " | ".join(line) + " |" for line in (COLUMNS, ("---",) * len(COLUMNS), *lines)]
    text += ["", *(f"- {key}: {value}" for key, value in facts.items())]
    text += [f"- {contender} failed and was dropped" for contender in outcome.failures]
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"merge-{'big-' * options.big}{machine.slug()}"
    (options.out / f"{stem}.md").write_text("\n".join([f"# {title}", "", *text, ""]))
    whole = {"facts": facts, "disk": asdict(disk), **asdict(outcome)}
    (options.out / f"{stem}.json").write_text(json.dumps(whole, indent=1) + "\n")


def main() -> int:
    """Make the models, merge, report; return 1 if a contender failed or the linear merges differ."""
    options = parse_options()
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=options.work) as place:
        work = Path(place)
        more = ["--smoke"] * options.smoke + ["--big"] * options.big
        child("bench.merge_models", place, str(options.count), *more, threads=options.threads)
        disk = measure_disk(work, 1 << (26 if options.smoke else 31 if options.big else 30))
        outcome = measure(work, options)
    if outcome.runs:
        report(options, outcome, disk)
    linear = outcome.apart.get("linear", {"apart": 0.0})
    return int(bool(outcome.failures) or not outcome.runs or linear["apart"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
