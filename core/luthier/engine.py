"""The training loop: examples → trees → packs → loss → backward → clip → optimiser → schedule.

A step divides once, by the weight of all its examples, so its gradient does not depend on how they were
packed. Nothing asks the device for a number between logging points.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from luthier.data import Sampler
from luthier.errors import LuthierError
from luthier.objective import Loss, Objective
from luthier.policy import Policy
from luthier.report import StepReport, peak_memory_mb
from luthier.tree import Pack, Tree, cut


@dataclass(frozen=True)
class Plan:
    """What a run of the loop needs to know.

    Attributes:
        total_steps: Optimiser steps.
        pack_tokens: Tokens one forward pass may hold.
        clip_norm: Largest global gradient norm, or None.
        log_every: Steps between logging points.
        evaluate_every: Steps between evaluations; 0: none.
    """

    total_steps: int
    pack_tokens: int
    clip_norm: float | None
    log_every: int
    evaluate_every: int = 0


@dataclass
class Meter:
    """Sums between two logging points, kept on the device."""

    sums: dict[str, torch.Tensor | float] = field(default_factory=lambda: defaultdict(float))
    weights: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, loss: Loss) -> None:
        """Add the loss and the metrics of one pack."""
        for name, (value, weight) in {"loss": (loss.total, loss.weight), **loss.metrics}.items():
            self.sums[name] = self.sums[name] + value.detach()
            self.weights[name] += weight

    def drain(self) -> dict[str, float]:
        """Return the averages and start anew."""
        means = {name: float(value) / self.weights[name] for name, value in self.sums.items()}
        self.sums.clear()
        self.weights.clear()
        return means


def accumulate(
    policy: Policy, objective: Objective, trees: Sequence[Tree], pack_tokens: int, meter: Meter
) -> tuple[float, int]:
    """Run forward and backward over the packs of one step; gradients hold the *sum*.

    Returns:
        The step's weight and its tokens.
    """
    weight, tokens = 0.0, 0
    for indices in cut(trees, pack_tokens):
        pack = Pack.of([trees[i] for i in indices], policy.device)
        loss = objective.loss(policy, pack)
        loss.total.backward()  # type: ignore[no-untyped-call]
        meter.add(loss)
        weight += loss.weight
        tokens += pack.input_ids.shape[1]
    return weight, tokens


def normalise(parameters: Sequence[nn.Parameter], weight: float, clip_norm: float | None) -> torch.Tensor:
    """Divide the summed gradients by `weight`, clip them, and return their norm before clipping."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(gradients, 1.0 / weight)
    return nn.utils.clip_grad_norm_(parameters, math.inf if clip_norm is None else clip_norm, foreach=True)


def run(
    policy: Policy,
    objective: Objective,
    trees: Sequence[Tree],
    sampler: Sampler,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    plan: Plan,
    on_log: Callable[[StepReport], None],
    on_evaluate: Callable[[int], object],
) -> None:
    """Train for `plan.total_steps` steps.

    Raises:
        LuthierError: The loss or the gradient is not finite, seen at the next logging point.
    """
    parameters = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    meter, tokens, window_tokens, seconds = Meter(), 0, 0, 0.0
    policy.model.train()
    start = time.perf_counter()
    for step, indices in enumerate(sampler.batches(plan.total_steps), 1):
        weight, count = accumulate(policy, objective, [trees[i] for i in indices], plan.pack_tokens, meter)
        grad_norm = normalise(parameters, weight, plan.clip_norm)
        learning_rate = schedule.get_last_lr()[0]
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        window_tokens += count
        evaluating = plan.evaluate_every and step % plan.evaluate_every == 0 and step < plan.total_steps
        if step % plan.log_every == 0 or step in (1, plan.total_steps) or evaluating:
            means, norm = meter.drain(), float(grad_norm)
            window = time.perf_counter() - start
            seconds, tokens = seconds + window, tokens + window_tokens
            report = StepReport(
                step=step,
                total_steps=plan.total_steps,
                epoch=step / sampler.steps_per_epoch,
                loss=means.pop("loss"),
                metrics=means,
                learning_rate=float(learning_rate),
                grad_norm=norm,
                tokens=tokens,
                tokens_per_second=window_tokens / window,
                memory_mb=peak_memory_mb(policy.device),
                seconds=seconds,
            )
            check_finite(report)
            on_log(report)
            if evaluating:
                on_evaluate(step)
                policy.model.train()
            window_tokens, start = 0, time.perf_counter()


def check_finite(report: StepReport) -> None:
    """Stop a run whose numbers are no longer numbers."""
    if not (math.isfinite(report.loss) and math.isfinite(report.grad_norm)):
        raise LuthierError(
            f"step {report.step}: loss {report.loss}, gradient norm {report.grad_norm}: not finite; "
            "lower optimiser.lr, or train with model.dtype=float32"
        )
