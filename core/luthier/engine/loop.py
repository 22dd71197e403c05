"""The training loop: examples → trees → packs → loss → backward → clip → optimiser → schedule.

A step divides once, by the weight of all its examples, so its gradient depends neither on how they were
packed nor on how many processes shared the packs. Nothing asks an accelerator for a number between logging
points.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from luthier.contracts import InBackward, Objective
from luthier.data import Batches
from luthier.engine.monitors import Guard, Monitor, Skips, Unmoved
from luthier.engine.pooling import pooled
from luthier.engine.progress import Observer, Plan, Progress
from luthier.errors import GuardError
from luthier.policy import ModelPolicy
from luthier.runs import StepReport
from luthier.system import Processes, local_tensor, peak_memory_mb, whole_tensor
from luthier.trees import Pack, Tree, cut


@dataclass
class Loop:
    """A run of the loop; `progress` may be that of a checkpoint."""

    policy: ModelPolicy
    objective: Objective
    batches: Batches
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    plan: Plan
    observer: Observer
    progress: Progress = field(default_factory=Progress)
    processes: Processes = field(default_factory=Processes)

    def __post_init__(self) -> None:
        """Take up the window that a checkpoint interrupted."""
        self._parameters = [p for p in self.policy.model.parameters() if p.requires_grad]
        self._meter = Monitor.of(self.progress.window if self.processes.main else {})
        self._guard = Guard()
        self._in_backward = self.optimiser if isinstance(self.optimiser, InBackward) else None
        self._skips = Skips(self.optimiser)
        self._start = time.perf_counter()

    def run(self) -> Progress:
        """Train up to the last step, or until patience ends, and return where that was.

        Raises:
            LuthierError: The loss or the gradient is not finite; the rows of that pack are named.
            GuardError: The batches say that it should not go on; a checkpoint was saved.
        """
        progress, plan = self.progress, self.plan
        unmoved = Unmoved(self.policy.model, progress.step, plan.total_steps)
        self._start = time.perf_counter() - progress.window_seconds
        self.policy.model.train()
        while progress.step < plan.total_steps and not self.finished:
            trees = self._next()
            self._step(trees, progress.step + 1)
            unmoved.look(progress.step)
            best = self._reflect()
            stopping = self.observer.stopping(progress.step)
            if best or stopping or self.observer.due(progress.step):
                self._save()
            if stopping:
                self.observer.leave(progress.step)
        return progress

    @property
    def finished(self) -> bool:
        """Whether patience has ended."""
        return self.plan.patience is not None and self.progress.worse >= self.plan.patience

    def _save(self) -> None:
        if self.plan.skips_non_finite:
            self._check(math.nan if any(self.processes.gather(self._guard.saw_non_finite)) else 0.0)
        else:
            self._check(float(self._norm))  # a checkpoint holds no broken weights
        self._pause()
        # Sums of all processes, as another number of them may take them up.
        self.progress.window = Monitor.sums_of(self.processes.gather(self._meter.state()))
        self.observer.save(self.progress)
        self._start = time.perf_counter() - self.progress.window_seconds

    def _next(self) -> list[Tree]:
        try:
            self._batch = self.batches.batch(self.progress.step)
        except GuardError:
            if self.progress.step:
                self._save()
            raise
        return self._batch

    def _step(self, trees: Sequence[Tree], step: int) -> None:
        weight = self._accumulate(trees, step)
        self._rate = float(self.schedule.get_last_lr()[0])
        if self._in_backward:
            self.optimiser.step()
            self._see(self._in_backward.gradient_norm(), step)
        else:
            weight_of_all = self.processes.sum_gradients(self._parameters, weight)
            self._see(normalise(self._parameters, weight_of_all, self.plan.max_grad_norm), step)
            self.optimiser.step()
        self.schedule.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.progress.step = step
        self.progress.window_tokens += sum(tree.tokens for tree in trees)

    def _see(self, norm: torch.Tensor, step: int) -> None:
        self._norm = norm
        if self.plan.skips_non_finite:
            return
        self._guard.see(norm, step)
        if self.policy.device.type == "cpu":  # where looking costs nothing, the weights stay good
            self._check(float(norm))

    def _accumulate(self, trees: Sequence[Tree], step: int) -> float:
        packs = [[trees[i] for i in pack] for pack in cut(trees, self.plan.pack_tokens, self.processes.count)]
        mine = self.processes.share(packs)
        known = pooled(self.policy, self.objective, packs, self.processes)
        guard, moving = self._guard, self._in_backward
        weight = accumulate(self.policy, self.objective, mine, self._meter, guard, step, moving, known)
        if self.processes.sharded:
            # Every process must take part in every forward and backward pass.
            for _ in range(-(-len(packs) // self.processes.count) - len(mine)):
                pack = Pack.of([min(trees, key=lambda tree: tree.tokens)], self.policy.device, known)
                (self.objective.loss(self.policy, pack).total * 0.0).backward()  # type: ignore[no-untyped-call]
        return weight

    def _reflect(self) -> bool:
        """Log and evaluate where it is due; return whether the evaluation was the best so far and is kept."""
        step, plan = self.progress.step, self.plan
        last = step == plan.total_steps
        # The last weights are evaluated after training, but to be the best they must compete.
        evaluating = bool(every := plan.evaluate_every) and (plan.keep_best if last else step % every == 0)
        if not (step % plan.log_every == 0 or step == 1 or last or evaluating):
            return False
        self._log()
        best = evaluating and self._improved(self.observer.evaluate(step))
        self.policy.model.train()
        self._start = time.perf_counter()
        return best and plan.keep_best

    def _log(self) -> None:
        self._pause()
        means, norm, progress = self._meter.drain(self.processes), float(self._norm), self.progress
        loss = means.pop("loss")
        self._check(norm if math.isfinite(loss) and not self.plan.skips_non_finite else loss)
        means = {
            **self.batches.metrics(),
            **self.objective.summarise(means),
            **self._skips.look(progress.step),
        }
        self._guard.clear()
        progress.seconds += progress.window_seconds
        progress.tokens += progress.window_tokens
        progress.first_loss = loss if progress.first_loss is None else progress.first_loss
        progress.last_loss = loss
        report = StepReport(
            step=progress.step,
            total_steps=self.plan.total_steps,
            epoch=progress.step / self.batches.steps_per_epoch,
            loss=loss,
            metrics=means,
            learning_rate=self._rate,
            grad_norm=norm,
            tokens=progress.tokens,
            tokens_per_second=progress.window_tokens / progress.window_seconds,
            memory_mb=peak_memory_mb(self.policy.device),
            seconds=progress.seconds,
        )
        progress.window_tokens, progress.window_seconds = 0, 0.0
        self.observer.log(report)

    def _improved(self, loss: float) -> bool:
        better = self.progress.best_loss is None or loss < self.progress.best_loss
        if better:
            self.progress.best_loss, self.progress.best_step = loss, self.progress.step
        self.progress.worse = 0 if better else self.progress.worse + 1
        return better

    def _check(self, value: float) -> None:
        if not math.isfinite(value):
            self._guard.stop(self.processes, self._origins, self._faulty)

    def _origins(self, step: int) -> list[str]:
        # A guard may see a step late; some batches have only their last one left.
        late = step != self.progress.step and self.batches.repeatable
        return [tree.origin for tree in (self.batches.batch(step - 1) if late else self._batch)]

    @torch.no_grad()
    def _faulty(self, origins: list[str]) -> list[str]:
        """Return those of `origins` whose loss by themselves is not finite; all of them where none is."""
        if self.processes.sharded:  # which runs in all processes or in none
            return origins
        alone = [Pack.of([tree], self.policy.device) for tree in self._batch if tree.origin in origins]
        losses = [(pack.trees[0].origin, self.objective.loss(self.policy, pack).total) for pack in alone]
        return [origin for origin, loss in losses if not math.isfinite(float(loss))] or origins

    def _pause(self) -> None:
        self.progress.window_seconds = time.perf_counter() - self._start


def accumulate(
    policy: ModelPolicy,
    objective: Objective,
    packs: Sequence[Sequence[Tree]],
    meter: Monitor,
    guard: Guard | None = None,
    step: int = 1,
    in_backward: InBackward | None = None,
    known: Mapping[str, float] | None = None,
) -> float:
    """Run forward and backward over `packs`; gradients hold the *sum*, or are used up. Return its weight."""
    weight = 0.0
    for number, trees in enumerate(packs, 1):
        loss = objective.loss(policy, Pack.of(trees, policy.device, known))
        weight += loss.weight
        if in_backward:
            in_backward.announce(last=number == len(packs), weight=weight)
        loss.total.backward()  # type: ignore[no-untyped-call]
        meter.add(loss)
        if guard:
            guard.see(loss.total, step, [tree.origin for tree in trees])
    return weight


def normalise(
    parameters: Sequence[nn.Parameter], weight: float | torch.Tensor, max_grad_norm: float | None
) -> torch.Tensor:
    """Divide the summed gradients by `weight`, clip them, and return their norm before clipping."""
    gradients = [local_tensor(parameter.grad) for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(gradients, 1.0 / weight)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    if max_grad_norm is not None:
        # Infinite becomes NaN, and with it all gradients: else the finite ones would be 0.
        nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm + 0.0 * norm, foreach=True)
    return whole_tensor(norm)
