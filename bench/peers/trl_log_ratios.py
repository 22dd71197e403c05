"""Log-probabilities of the bench's pairs as TRL has them when it trains, with the adapter `Job.start`.

It does train, at a learning rate of zero, and what the model gives is noted: in each step first the policy's,
then, the adapter being off, the reference's.
"""

from dataclasses import replace
from typing import Any

import torch

from bench.gate import Logprobs
from bench.job import Job, answer
from bench.peers.trl_preference import trainer_of


def run(job: Job) -> Logprobs:
    """Run an epoch in which nothing changes."""
    trainer = trainer_of(replace(job, learning_rate=0.0), [])
    seen: list[list[list[float]]] = []

    def note(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        rows = zip(output.log_probs.detach(), output.label_mask, strict=True)
        sides = [values[mask].tolist() for values, mask in rows]
        # A batch holds all chosen sides, then all rejected ones.
        half = len(sides) // 2
        seen.append([side for pair in zip(sides[:half], sides[half:], strict=True) for side in pair])

    trainer.model.register_forward_hook(note)
    trainer.train()
    policy, reference = ([side for step in seen[part::2] for side in step] for part in (0, 1))
    return Logprobs(job.contender, job.precision, policy, list(map(sum, reference)))


if __name__ == "__main__":
    answer(run)
