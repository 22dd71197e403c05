"""Scoring N candidates of one prompt together and one by one: ``python -m bench.score [--smoke]``.

A reward model of SmolLM2-135M's size scores N completions of about 27 tokens of each of some XSum prompts of
about 329: as one token tree a prompt, one candidate at a time, and by transformers' own class on padded
batches of N. In one process, in turn; the scores are compared.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import data, machine, sft
from bench.report import markdown
from bench.side_by_side import ROOT
from luthier import Candidate, Codec, ModelPolicy
from luthier.models import as_classifier, attach_head
from luthier_toolkits.rewards import RewardNetwork

APART = 1e-3
"""How far apart, in fp32, two ways may score a candidate."""


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=8, help="prompts")
    parser.add_argument("--n", type=int, nargs="+", default=[4, 16], help="candidates of each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny random model: does everything still run?"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args()
    if options.smoke:
        options.rows, options.n, options.rounds = 4, [3], 1
    return options


def candidates(options: argparse.Namespace, n: int) -> list[list[Candidate]]:
    """Return N candidates of every prompt: its own summary and those of other rows."""
    rows = [json.loads(line) for line in data.workload_files(options.rows, options.smoke)[0].open()]
    texts = [row["completion"][0]["content"] for row in rows]
    varied = [
        [f"{texts[(place + turn) % len(texts)]} ({turn})" for turn in range(n)] for place in range(len(rows))
    ]
    return [[Candidate(row["prompt"], text) for text in own] for row, own in zip(rows, varied, strict=True)]


def by_transformers(model: torch.nn.Module, judge: RewardNetwork, own: list[Candidate]) -> torch.Tensor:
    """Score the candidates of one prompt as a padded batch of transformers' class."""
    from luthier_toolkits.rewards import answer_tree

    trees = [answer_tree(one, judge.codec) for one in own]
    rows = [[*tree.prompt, *tree.branches[0].ids] for tree in trees]
    width = max(map(len, rows))
    pad = int(model.config.pad_token_id)
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad(), judge.policy.native_attention():
        return model(input_ids=ids, attention_mask=mask).logits[:, 0].float()


def main() -> int:
    """Measure, report, and return 1 if the scores differ."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    sft.prepare(options)
    folder = data.model_folder(options.smoke)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.config.pad_token_id = 0
    attach_head(model, "sequence", torch.Generator().manual_seed(0))
    policy = ModelPolicy(model)
    policy.check()
    judge = RewardNetwork(policy, Codec(tokenizer), None, 4096)
    classifier = as_classifier(model)
    facts, worst = machine.describe(), 0.0
    for n in options.n:
        prompts = candidates(options, n)
        ways: dict[str, Callable[[], torch.Tensor]] = {
            "one by one": lambda p=prompts: torch.cat([judge.ends([one]) for own in p for one in own]),
            "transformers, padded": lambda p=prompts: torch.cat(
                [by_transformers(classifier, judge, own) for own in p]
            ),
            "together": lambda p=prompts: judge.ends([one for own in p for one in own]),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        scores: dict[str, torch.Tensor] = {}
        for _ in range(options.rounds):
            for name, way in ways.items():
                began = time.perf_counter()
                scores[name] = way()
                seconds[name].append(time.perf_counter() - began)
        base = seconds["one by one"]
        for name, taken in seconds.items():
            ratios = [one / other for one, other in zip(base, taken, strict=True)]
            facts[f"N={n}, {name}"] = (
                f"{len(scores[name]) / median(taken):.1f} candidates/s, {median(ratios):.2f}× "
                f"({min(ratios):.2f}–{max(ratios):.2f})"
            )
            print(f"N={n}, {name}: {facts[f'N={n}, {name}']}", flush=True)
            worst = max(worst, float((scores[name] - scores["one by one"]).abs().max()))
    facts["scores"] = (
        f"{'agree' if worst <= APART else 'DIFFER'}, at most {worst:.1e} apart, allowed {APART:.0e}"
    )
    facts["setting"] = f"fp32, {options.rows} prompts, {options.rounds} rounds, {options.threads} threads"
    text = markdown(
        "Scoring N candidates of a prompt", [f"{what}: {told}" for what, told in facts.items()], []
    )
    print(facts["scores"])
    if not options.smoke:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"score-{machine.slug()}.md").write_text(text)
    return int(worst > APART)


if __name__ == "__main__":
    raise SystemExit(main())
