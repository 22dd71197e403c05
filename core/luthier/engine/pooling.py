"""What a loss must know of its whole step before any of it is computed: pooled over packs and processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from luthier.contracts import Objective
from luthier.engine.monitors import Monitor
from luthier.policy import ModelPolicy
from luthier.system import Processes
from luthier.trees import Pack, Tree


@torch.no_grad()
def pooled(
    policy: ModelPolicy, objective: Objective, packs: Sequence[Sequence[Tree]], processes: Processes
) -> dict[str, float] | None:
    """Return what `objective` pools over `packs`, those of all processes; None where it need not.

    Every process calls it with all packs and measures its share.
    """
    if not objective.pools or len(packs) < 2:
        return None
    mine = list(processes.share(packs))
    # A sharded model runs in all processes or in none: who has fewer packs measures its first one again.
    rounds = -(-len(packs) // processes.count) if processes.sharded else len(mine)
    sums = []
    for number in range(rounds):
        trees = mine[number] if number < len(mine) else packs[0]
        metrics = objective.pool(policy, Pack.of(trees, policy.device))
        sums += [metrics] if number < len(mine) else []
    totals = Monitor.sums_of([pack_metrics for part in processes.gather(sums) for pack_metrics in part])
    return {name: value / weight if weight else 0.0 for name, (value, weight) in totals.items()}
