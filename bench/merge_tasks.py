"""Three adapters, a task each, merged every way: ``python -m bench.merge_tasks [--smoke]``.

LoRA on SmolLM2-135M learns sums, greatest common divisors and spelling words backward, a run each; every
merge of the three is scored on held-out problems of all three, beside the base and the adapters alone.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from bench import data, machine, sft
from bench.commands import luthier
from bench.side_by_side import ROOT

TASKS = {
    "sums": ("chain_sum", "{min_terms: 2, max_terms: 3, min_digits: 1, max_digits: 1}"),
    "divisors": ("gcd", "{min_numbers: 2, max_numbers: 2, min_value: 1, max_value: 30}"),
    "backward": ("spell_backward", "{min_word_len: 3, max_word_len: 4}"),
}
SYSTEM = "Answer with the result only."
MERGES = {
    "soup": ["merger=soup"],
    "soup, rank 16": ["merger=soup", "result=adapter", "rank=16"],
    "task_arithmetic, λ 0.6": ["merger=task_arithmetic", "merger.scaling=0.6"],
    "ties, density 0.2": ["merger=ties"],
    "ties, density 0.5, λ 1.5": ["merger=ties", "merger.density=0.5", "merger.scaling=1.5"],
    "ties, model": ["merger=ties", "merger.trim=model"],
    "dare": ["merger=dare"],
    "dare, λ 2": ["merger=dare", "merger.scaling=2"],
    "dare, ties": ["merger=dare", "merger.then=ties"],
}


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=960, help="rows an adapter learns from")
    parser.add_argument("--held-out", type=int, default=100, help="problems a score is made of")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny random model: does everything still run?"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args()
    if options.smoke:
        options.rows, options.held_out = 16, 4
    return options


def source(where: str, task: str, size: int) -> list[str]:
    """Return the options of a task's rows under the key `where`."""
    name, settings = TASKS[task]
    given = {"task": name, "size": size, "options": settings, "system": f"'{SYSTEM}'"}
    return [f"{where}.{key}={value}" for key, value in given.items()]


def tuned(model: Path, task: str, run: Path, options: argparse.Namespace) -> Path:
    """Train an adapter on a task."""
    luthier(
        options.threads, "train", f"model.path={model}", "data=reasoning_gym",
        *source("data", task, options.rows),
        "adapter.dropout=0", "optimiser.lr=1e-3", "tracker=[metrics]", "checkpoint.every=0",
        f"seed={options.seed}", f"run_dir={run}",
    )  # fmt: skip
    return run


def scores(
    models: dict[str, Path], run: Path, merge: list[str], options: argparse.Namespace
) -> dict[str, float]:
    """Merge, and return the share of right answers by task."""
    paths = ", ".join(f"{label}: {path}" for label, path in models.items())
    tasks = [
        word
        for task in TASKS
        for word in (
            f"+data@tasks.{task}=reasoning_gym",
            f"tasks.{task}.split=held_out",
            *source(f"tasks.{task}", task, options.held_out),
        )
    ]
    luthier(
        options.threads, "merge", f"models={{{paths}}}", *merge, *tasks, "evaluation.max_new_tokens=12",
        "max_memory=4", f"run_dir={run}",
    )  # fmt: skip
    found: dict[str, float] = json.loads((run / "summary.json").read_text())["scores"]
    return found


def main() -> int:
    """Train, merge, score and report."""
    options = parse_options()
    sft.prepare(argparse.Namespace(rows=8, smoke=options.smoke, threads=options.threads))
    model = Path(data.model_folder(options.smoke))
    rows: dict[str, dict[str, float]] = {}
    with TemporaryDirectory() as place:
        work = Path(place)
        rows["base"] = scores({"untuned": model}, work / "base", ["merger=soup"], options)
        adapters = {task: tuned(model, task, work / task, options) for task in TASKS}
        for task, run in adapters.items():
            rows[f"tuned on {task}"] = scores({task: run}, work / f"alone-{task}", ["merger=soup"], options)
        for number, (name, merge) in enumerate(MERGES.items()):
            rows[name] = scores(adapters, work / f"merge-{number}", merge, options)
            print(name, rows[name], flush=True)
    lines = ["| | " + " | ".join(TASKS) + " | mean |", "|---" * (len(TASKS) + 2) + "|"]
    table = Table("", *TASKS, "mean", title="right answers to held-out problems")
    for name, found in rows.items():
        shown = [f"{found[task]:.0%}" for task in TASKS] + [f"{sum(found.values()) / len(found):.0%}"]
        table.add_row(name, *shown)
        lines.append(f"| {name} | {' | '.join(shown)} |")
    Console().print(table)
    if not options.smoke:
        facts = machine.describe() | {
            "rows": options.rows,
            "held out": options.held_out,
            "seed": options.seed,
        }
        notes = [f"- {what}: {told}" for what, told in facts.items()]
        text = "\n".join(
            ["# Three adapters merged, right answers to held-out problems", "", *notes, "", *lines, ""]
        )
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"merge-tasks-{machine.slug()}.md").write_text(text)
        (options.out / f"merge-tasks-{machine.slug()}.json").write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
