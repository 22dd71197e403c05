"""GaLore's bases beside galore-torch's, and how even the steps are: ``python -m bench.galore [--smoke]``.

Gradients of four matrices of SmolLM2-135M, of all its parameters on XSum rows: "before", then eight steps of
AdamW on other rows, then "after", on rows that neither has seen. What is timed renews the basis of "before"
for "after", contender after contender within each round; the energy loss is against the best basis of its
rank. The same for one 4096×4096 matrix, made up. Then training runs, the time of every step.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from galore_torch.galore_projector import GaLoreProjector
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import luthier
from bench import data, machine
from bench.side_by_side import ROOT
from luthier_plugins.optimisers.galore import cold_basis, exact_basis, warm_basis

SUFFIXES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
ROWS = 32
PEER = "galore-torch"


@dataclass(frozen=True)
class Renewal:
    """A basis renewed: the median of the rounds, and the share of the best basis's energy that it lacks."""

    matrix: str
    contender: str
    milliseconds: float
    energy_loss: float


@dataclass(frozen=True)
class Steps:
    """The steps of a training run in seconds: the first one, then median and longest of the others."""

    run: str
    first: float
    median: float
    longest: float


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="times every basis is renewed")
    parser.add_argument(
        "--steps", type=int, default=8, help="steps of a training run of 4 rows each; 0: none"
    )
    parser.add_argument("--large", type=int, default=4096, help="side of the large matrix; 0: none")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--out", type=Path, help="folder of the results (bench/results; smoke: bench/.cache)")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model and matrices, in seconds")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.large = 2, min(options.large, 256)
    options.rank = 8 if options.smoke else 128
    options.out = options.out or (data.CACHE if options.smoke else ROOT / "bench/results")
    return options


def real_gradients(smoke: bool) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return name → gradient before and after some steps, made once and kept in the cache."""
    path = data.CACHE / f"galore-gradients{'-smoke' if smoke else ''}.safetensors"
    if not path.exists():
        save_file(make_gradients(smoke), path)
    found = load_file(path)
    names = [key.removeprefix("before.") for key in found if key.startswith("before.")]
    return {name: (found[f"stages.{name}"], found[f"after.{name}"]) for name in names}


def make_gradients(smoke: bool) -> dict[str, torch.Tensor]:
    """Return the gradients as the module's docstring says."""
    rows = json.loads(data.workload_files(ROWS, smoke)[1].read_text())
    model = AutoModelForCausalLM.from_pretrained(data.model_folder(smoke), dtype=torch.float32)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-5)
    layer = model.config.num_hidden_layers // 3
    names = [f"model.layers.{layer}.{suffix}.weight" for suffix in SUFFIXES]

    def backward(first: int, last: int) -> dict[str, torch.Tensor]:
        for row in rows[first:last]:
            ids = torch.tensor([row["input_ids"]])
            labels = ids.clone()
            labels[:, : row["prompt_length"]] = -100
            model(ids, labels=labels).loss.backward()
        return {name: model.get_parameter(name).grad.clone() for name in names}

    kept = {f"stages.{name}": gradient for name, gradient in backward(0, 4).items()}
    for step in range(8):
        optimiser.step()
        optimiser.zero_grad()
        backward(4 + 2 * step, 6 + 2 * step)
    optimiser.step()
    optimiser.zero_grad()
    return kept | {f"after.{name}": gradient for name, gradient in backward(24, 28).items()}


def made_up(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two (side, side) matrices whose spectrum decays as gradients' do; the second one has drifted."""
    g = torch.Generator().manual_seed(0)
    left, right, more = (torch.randn(side, side // 8, generator=g) for _ in range(3))
    decay = torch.exp(-torch.arange(side // 8) / (side / 64))
    noise = 0.02 * torch.randn(side, side, generator=g)
    return (left * decay) @ right.T + noise, ((left + 0.5 * more) * decay) @ right.T + noise


def contenders(
    last: torch.Tensor, matrix: torch.Tensor, rank: int
) -> Mapping[str, Callable[[], torch.Tensor]]:
    """Return who renews the basis, ours as (short, r)."""
    basis = exact_basis(last, rank)

    def peer() -> torch.Tensor:
        projector = GaLoreProjector(rank=rank)
        projector.project(matrix, 0)
        found: torch.Tensor = projector.ortho_matrix
        return found if matrix.shape[0] < matrix.shape[1] else found.T

    return {
        PEER: peer,
        "exact": lambda: exact_basis(matrix, rank),
        "cold": lambda: cold_basis(matrix, rank, torch.Generator().manual_seed(0)),
        "warm": lambda: warm_basis(matrix, basis),
        "left as it was": lambda: basis,
    }


def energy(basis: torch.Tensor, matrix: torch.Tensor, right: bool) -> float:
    """Return ‖PᵀG‖², or ‖G P‖² of a basis of the right side, in fp64."""
    return float((basis.double().T @ (matrix.T if right else matrix).double()).square().sum())


def renew(
    name: str, pair: tuple[torch.Tensor, torch.Tensor], rank: int, rounds: int, slow: int
) -> list[Renewal]:
    """Time every contender on one matrix, in turn; the decompositions `slow` times only."""
    before, matrix = pair
    who = contenders(before, matrix, rank)
    times: dict[str, list[float]] = {contender: [] for contender in who}
    bases: dict[str, torch.Tensor] = {}
    for turn in range(rounds):
        for contender, call in who.items():
            if contender in (PEER, "exact") and turn >= slow:
                continue
            start = time.perf_counter()
            bases[contender] = call()
            times[contender].append(1000 * (time.perf_counter() - start))
    m, n = matrix.shape
    # Of a square matrix galore-torch takes the right side, the paper and Luthier the left.
    held = {c: energy(basis, matrix, m > n or (m == n and c == PEER)) for c, basis in bases.items()}
    shape = f"{name} {m}×{n}"
    return [Renewal(shape, c, median(times[c]), 1 - held[c] / held["exact"]) for c in who]


def train_steps(options: argparse.Namespace, layerwise: bool) -> Steps:
    """Train all parameters with GaLore and return the times of the steps, forward and backward included."""
    rows, _ = data.workload_files(ROWS, options.smoke)
    with TemporaryDirectory() as work:
        overrides = [
            f"model.path={data.model_folder(options.smoke)}", "model.dtype=float32", "data=jsonl",
            f"data.path={rows}", "adapter=full", "optimiser=galore", f"optimiser.rank={options.rank}",
            "optimiser.lr=1e-5", f"optimiser.layerwise={layerwise}", "max_grad_norm=null", "batch_size=4",
            "pack_tokens=1536", f"max_steps={options.steps}", "log_every=1", "tracker=[metrics]",
            "checkpoint.every=0", f"run_dir={work}/run",
        ]  # fmt: skip
        luthier.train(luthier.compose("train", overrides))
        lines = (Path(work) / "run/metrics.jsonl").read_text().splitlines()
    ends = [json.loads(line)["seconds"] for line in lines]
    first, *others = [b - a for a, b in zip([0.0, *ends], ends, strict=False)]
    return Steps("layerwise" if layerwise else "plain", first, median(others), max(others))


def tables(renewals: list[Renewal], steps: list[Steps]) -> str:
    """Return the results as Markdown: by matrix, the four together, the steps."""
    lines = ["| matrix | contender | ms | times as fast | energy loss |", "|---|---|--:|--:|--:|"]
    peers = {one.matrix: one.milliseconds for one in renewals if one.contender == PEER}
    for one in renewals:
        faster = f"{peers[one.matrix] / one.milliseconds:.1f}×" if one.milliseconds > 0.01 else "–"
        lines.append(
            f"| {one.matrix} | {one.contender} | {one.milliseconds:.2f} | {faster} | {one.energy_loss:.5f} |"
        )
    for contender in ("exact", "cold", "warm"):
        four = [one for one in renewals if one.contender == contender and not one.matrix.startswith("made")]
        took = sum(one.milliseconds for one in four)
        faster = sum(peers[one.matrix] for one in four) / took
        worst = max(one.energy_loss for one in four)
        lines.append(
            f"| **the real ones** | {contender} | {took:.1f} | {faster:.1f}× | at most {worst:.5f} |"
        )
    lines += [
        "",
        "| training run | first step s | median s | longest s | longest / median | first / median |",
    ]
    lines += ["|---|--:|--:|--:|--:|--:|"] * bool(steps)
    lines += [
        f"| {one.run} | {one.first:.2f} | {one.median:.2f} | {one.longest:.2f} | "
        f"{one.longest / one.median:.2f} | {one.first / one.median:.2f} |"
        for one in steps
    ]
    return "\n".join(lines if steps else lines[:-2]) + "\n"


def main() -> None:
    """Measure and report."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    data.CACHE.mkdir(exist_ok=True)
    data.prepare_model(options.smoke)
    data.prepare_rows(ROWS, options.smoke)
    renewals = []
    for name, pair in real_gradients(options.smoke).items():
        short = name.removeprefix("model.layers.").removesuffix(".weight")
        renewals += renew(short, pair, options.rank, options.rounds, options.rounds)
    if options.large:
        renewals += renew("made up", made_up(options.large), options.rank, options.rounds, slow=1)
    steps = [train_steps(options, layerwise) for layerwise in (False, True)] if options.steps > 1 else []
    facts = {"date": str(date.today()), "rank": str(options.rank), "threads": str(options.threads)}
    facts |= machine.describe() | {"galore-torch": version("galore-torch")}
    table = tables(renewals, steps)
    print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"galore-{machine.slug()}"
    notes = "".join(f"- {key}: {value}\n" for key, value in facts.items())
    Path(f"{stem}.md").write_text(f"# GaLore: bases and steps\n\n{table}\n{notes}")
    whole = {"facts": facts, "renewals": list(map(asdict, renewals)), "steps": list(map(asdict, steps))}
    Path(f"{stem}.json").write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
