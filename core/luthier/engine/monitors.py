"""What is watched in training: running averages, values that are not finite, parameters that stay."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import nn

from luthier.contracts import Loss, Skipping
from luthier.errors import LuthierError
from luthier.system import Processes, local_tensor

log = logging.getLogger("luthier")
PATIENCE = 10
"""Steps after which a parameter should have moved, if the run is that long."""
NAMED = 8
"""Rows or parameters that a message names."""


@dataclass
class Monitor:
    """Sums between two logging points, kept on the device."""

    sums: dict[str, torch.Tensor | float] = field(default_factory=lambda: defaultdict(float))
    weights: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @classmethod
    def of(cls, state: Mapping[str, Sequence[float]]) -> Monitor:
        """Return a meter that holds what `state` returned."""
        meter = cls()
        for name, (value, weight) in state.items():
            meter.sums[name], meter.weights[name] = value, weight
        return meter

    def add(self, loss: Loss) -> None:
        """Add the loss and the metrics of one pack."""
        for name, (value, weight) in {"loss": (loss.total, loss.weight), **loss.metrics}.items():
            self.sums[name] = self.sums[name] + value.detach()
            self.weights[name] += weight

    def state(self) -> dict[str, tuple[float, float]]:
        """Return sums and weights by name."""
        return {name: (float(value), self.weights[name]) for name, value in self.sums.items()}

    def drain(self, processes: Processes | None = None) -> dict[str, float]:
        """Return the averages over all processes and start anew."""
        totals = self.sums_of((processes or Processes()).gather(self.state()))
        self.sums.clear()
        self.weights.clear()
        # A metric of some rows alone says nothing where there was none of them.
        return {name: value / weight for name, (value, weight) in totals.items() if weight}

    @staticmethod
    def sums_of(states: Sequence[Mapping[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
        """Add up the states of several processes."""
        totals: dict[str, tuple[float, float]] = {}
        for state in states:
            for name, (value, weight) in state.items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = before[0] + value, before[1] + weight
        return totals


class Guard:
    """Remembers, on the device, the first value that was not finite, and names its rows when asked."""

    def __init__(self) -> None:
        self._first: torch.Tensor | None = None
        self._seen: list[tuple[int, list[str] | None]] = []

    def see(self, value: torch.Tensor, step: int, origins: list[str] | None = None) -> None:
        """Look at a loss of the rows `origins`, or at the norm of the gradient of a whole step."""
        bad = ~torch.isfinite(value.detach())
        place = torch.where(bad, len(self._seen), -1)
        self._first = place if self._first is None else torch.where(self._first < 0, place, self._first)
        self._seen.append((step, origins))

    @property
    def saw_non_finite(self) -> bool:
        """Whether one of the values was not finite; asks the device."""
        return self._first is not None and int(self._first) >= 0

    def stop(
        self,
        processes: Processes,
        rows_of: Callable[[int], list[str]],
        faulty: Callable[[list[str]], list[str]] = list,
    ) -> NoReturn:
        """Say which rows gave the first value that was not finite; every process must call it.

        Args:
            processes: The run's.
            rows_of: Says which rows a step has.
            faulty: Says which of the rows of a pack are at fault.

        Raises:
            LuthierError: Always.
        """
        place = -1 if self._first is None else int(self._first)
        step, origins = self._seen[place]
        origins = faulty(origins) if place >= 0 and origins else origins
        all_seen = processes.gather((place, step, origins))
        faults = [(where, rows) for number, where, rows in all_seen if number >= 0 and rows is not None]
        if faults:
            step, what, rows = faults[0][0], "the loss", [row for _, some in faults for row in some]
        else:
            what, rows = "the gradient", rows_of(step)
        more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
        raise LuthierError(
            f"step {step}: {what} is not finite; its rows: {', '.join(rows[:NAMED])}{more}. The last "
            "checkpoint is kept. Look at these rows, lower optimiser.lr, or train in float32 if it is not"
        )

    def clear(self) -> None:
        """Forget what was fine."""
        self._first, self._seen = None, []


class Unmoved:
    """Warns of a trained parameter that the first steps left as it was (bf16 rounding, a broken graph)."""

    def __init__(self, model: nn.Module, start_step: int, total_steps: int) -> None:
        self._at = min(PATIENCE, total_steps)
        watching = start_step == 0 and total_steps > 2
        self._named = [(n, p) for n, p in model.named_parameters() if p.requires_grad] if watching else []
        self._before = [_mark(parameter) for _, parameter in self._named]

    def look(self, step: int) -> None:
        """Compare, once, after a few steps."""
        if step != self._at or not self._named:
            return
        pairs = zip(self._named, self._before, strict=True)
        still = [name for (name, p), before in pairs if torch.equal(_mark(p), before)]
        if still:
            more = f" and {len(still) - NAMED} more" if len(still) > NAMED else ""
            log.warning(
                "%d of %d trained parameters have not moved after %d steps: %s%s. They get no gradient, or "
                "steps too small for their dtype: check adapter.targets, model.dtype and optimiser.lr",
                len(still), len(self._named), step, ", ".join(still[:NAMED]), more,
            )  # fmt: skip
        self._named, self._before = [], []


class Skips:
    """Asks an optimiser that leaves out gradients that are not finite how often it did."""

    def __init__(self, optimiser: torch.optim.Optimizer) -> None:
        self._optimiser = optimiser if isinstance(optimiser, Skipping) else None
        self._warned = False

    def look(self, step: int) -> dict[str, float]:
        """Return the count as a metric, if there is something to count; the first time, warn as well."""
        count = self._optimiser.skipped if self._optimiser else 0
        if not count:
            return {}
        if not self._warned:
            log.warning(
                "up to step %d, %d times a parameter stayed: its gradient was not finite", step, count
            )
        self._warned = True
        return {"skipped_updates": float(count)}


def _mark(parameter: torch.Tensor) -> torch.Tensor:
    """Return two sums that a moved parameter does not keep; nothing of its size is allocated."""
    local = local_tensor(parameter.detach())
    return torch.stack([local.sum(dtype=torch.float64), torch.linalg.vector_norm(local, dtype=torch.float64)])
