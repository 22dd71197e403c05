"""PPO beside SFT with the same adapter: memory, and where the time goes: ``python -m bench.ppo [--smoke]``.

LoRA of rank 16 on all linear layers of SmolLM2-135M; PPO answers gsm_symbolic problems with a reward model
that is an adapter of the same base, and SFT trains on the answers that PPO rolled out: the same prompts, the
same tokens, the same packs. A fresh process each, A B A B; peaks are those of the whole process.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from bench import data, machine, sft
from bench.commands import luthier
from bench.report import markdown
from bench.side_by_side import ROOT

COMMON = [
    "adapter.rank=16", "adapter.alpha=32", "adapter.dropout=0", "batch_size=16", "pack_tokens=2048",
    "tracker=[metrics]", "checkpoint.every=0", "log_every=1", "optimiser.lr=1e-5",
]  # fmt: skip

SHARES = ("answering", "rest of the rollout", "training")


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help="how often both run")
    parser.add_argument("--rollouts", type=int, default=2, help="rollouts of a run, of 64 answers each")
    parser.add_argument("--tokens", type=int, default=96, help="tokens an answer may have")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny random model: does everything still run?"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.rollouts, options.tokens, options.precision = 1, 2, 8, ["fp32"]
    return options


def problems(number: int) -> list[str]:
    """Return the options of `number` problems."""
    task = ["task=gsm_symbolic", f"size={number}", "options={}", "system='Think step by step.'"]
    return ["data=reasoning_gym", *(f"data.{one}" for one in task)]


def reward_model(model: list[str], work: Path, threads: int) -> Path:
    """Train an adapter with a score head for one step: what it says does not matter here."""
    rows = work / "pairs.jsonl"
    pairs = [{"prompt": f"{n} + {n}?", "chosen": f"{2 * n}", "rejected": f"{3 * n}"} for n in range(1, 9)]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    run = work / "reward"
    luthier(threads, "train", *model, "objective=reward", "data=jsonl", f"data.path={rows}", "max_steps=1",
            *COMMON, f"run_dir={run}")  # fmt: skip
    return run


def ppo(model: list[str], reward: Path, run: Path, options: argparse.Namespace) -> dict[str, float]:
    """Train with PPO and return what it took."""
    luthier(
        options.threads, "train", *model, *problems(64 * options.rollouts), "objective=ppo",
        "objective.rollout_epochs=1", f"objective.max_new_tokens={options.tokens}", "reward_model=[outcome]",
        f"reward_models.outcome.model={reward}", *COMMON, f"run_dir={run}",
    )  # fmt: skip
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # Every step of a rollout tells of it; each is counted once.
    told = {one["metrics"]["seconds/answering"]: one["metrics"]["seconds/rollout"] for one in steps}
    lengths = {one["metrics"]["seconds/answering"]: one["metrics"]["length"] for one in steps}
    seconds = steps[-1]["seconds"]
    summary = json.loads((run / "summary.json").read_text())
    return {
        "peak": summary["peak_memory_mb"],
        "answering": sum(told) / seconds,
        "rest of the rollout": (sum(told.values()) - sum(told)) / seconds,
        "training": 1 - sum(told.values()) / seconds,
        "seconds": seconds,
        "answer tokens a second": 64 * sum(lengths.values()) / sum(told),
    }


def sft_peak(model: list[str], run: Path, out: Path, options: argparse.Namespace) -> float:
    """Train with SFT on what `run` rolled out, and return the peak in MB."""
    rows = out.with_suffix(".jsonl")
    lines = [json.loads(one) for path in sorted((run / "rollouts").glob("*.jsonl")) for one in path.open()]
    with rows.open("w") as file:
        for line in lines:
            said = [{"role": "assistant", "content": line["completion"] or "…"}]
            file.write(json.dumps({"prompt": line["prompt"], "completion": said}) + "\n")
    luthier(options.threads, "train", *model, "data=jsonl", f"data.path={rows}", *COMMON, f"run_dir={out}")
    peak: float = json.loads((out / "summary.json").read_text())["peak_memory_mb"]
    return peak


def main() -> int:
    """Measure and report."""
    options = parse_options()
    sft.prepare(argparse.Namespace(rows=8, smoke=options.smoke, threads=options.threads))
    facts = machine.describe()
    rows: dict[str, dict[str, str]] = {}
    with TemporaryDirectory() as work:
        for precision in options.precision:
            dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
            model = [f"model.path={data.model_folder(options.smoke)}", f"model.dtype={dtype}"]
            place = Path(work) / precision
            place.mkdir()
            reward = reward_model(model, place, options.threads)
            found = []
            for turn in range(options.rounds):
                run = place / f"ppo-{turn}"
                one = ppo(model, reward, run, options)
                one["sft peak"] = sft_peak(model, run, place / f"sft-{turn}", options)
                found.append(one)
                print(precision, {key: round(value, 3) for key, value in one.items()}, flush=True)
            middle = {key: median(one[key] for one in found) for key in found[0]}
            ratios = [one["peak"] / one["sft peak"] for one in found]
            rows[precision] = {
                "PPO peak MB": f"{middle['peak']:.0f}",
                "SFT peak MB": f"{middle['sft peak']:.0f}",
                "ratio, by round": f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
                **{f"time, {key}": f"{middle[key]:.0%}" for key in SHARES},
                "answer tok/s": f"{middle['answer tokens a second']:.0f}",
            }
    facts |= {f"{precision}, {what}": told for precision, one in rows.items() for what, told in one.items()}
    facts["setting"] = (
        f"{options.rollouts} rollouts of 64 answers of at most {options.tokens} tokens, one pass over each, "
        f"{options.rounds} rounds"
    )
    notes = [f"{what}: {told}" for what, told in facts.items()]
    text = markdown("PPO beside SFT, LoRA r 16 on all linear layers", notes, [])
    print(text)
    if not options.smoke:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"ppo-{machine.slug()}.md").write_text(text)
        (options.out / f"ppo-{machine.slug()}.json").write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
