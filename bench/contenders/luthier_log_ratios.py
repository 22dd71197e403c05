"""Log-probabilities of the bench's pairs as Luthier has them when it trains, with the adapter `Job.start`."""

from pathlib import Path

import torch
from safetensors.torch import load_file

import luthier
from bench.contenders.luthier_sft import overrides
from bench.gate import Logprobs
from bench.job import Job, answer
from luthier.adapters import PREFIX, WEIGHTS
from luthier.commands import prepared
from luthier.data import Sampler
from luthier.system import Processes
from luthier.trees import Pack, cut


def run(job: Job) -> Logprobs:
    """Prepare a run, its reference pass included, load the adapter, and ask for the packs of every step."""
    torch.set_num_threads(job.threads)
    config = luthier.compose("train", overrides(job))
    run = prepared(config, Path(job.work), Processes())
    policy, trees, model = run.policy, run.rows.data.trees, run.loaded.model
    weights = load_file(Path(job.start) / WEIGHTS)
    run.adapter.load_state(model, {name.removeprefix(PREFIX): one for name, one in weights.items()})
    model.train()
    sampler = Sampler(len(trees), config.batch_size, shuffle=False, seed=config.seed)
    found: dict[int, tuple[list[list[float]], list[float]]] = {}
    for step in range(sampler.steps_per_epoch):
        rows = sampler.batch(step)
        for places in cut([trees[row] for row in rows], config.pack_tokens):
            pack = Pack.of([trees[rows[place]] for place in places])
            logprobs = policy.logprobs(pack)
            tokens = [one.tolist() for one in logprobs.values.detach().split(list(logprobs.lengths))]
            references = policy.reference(pack).tolist()
            for number, place in enumerate(places):
                sides = slice(number * job.completions, (number + 1) * job.completions)
                found[rows[place]] = tokens[sides], references[sides]
    policies, references = ([x for row in sorted(found) for x in found[row][part]] for part in (0, 1))
    return Logprobs(job.contender, job.precision, policies, references)


if __name__ == "__main__":
    answer(run)
