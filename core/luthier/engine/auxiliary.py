"""One objective and a share of others on the same forward pass: DPO with some SFT on what was chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig

from luthier import config as configs
from luthier.contracts import Loss, Objective
from luthier.engine.wrapped import Wrapped
from luthier.errors import ConfigError
from luthier.policy import CachedPolicy, Policy
from luthier.trees import Pack


@dataclass(frozen=True)
class WithAuxiliary(Wrapped):
    """``L = L_inner + Σ wᵢ·Lᵢ``, each a mean over the whole step by its own weight.

    The others see the first branch of every tree that is imitable: the chosen completion of a pair, a
    desirable one.

    Attributes:
        others: Name → factor and objective.
    """

    others: Mapping[str, tuple[float, Objective]]

    @property
    def pools(self) -> bool:  # type: ignore[override]
        """True: every part is divided by a weight of its own."""
        return True

    def pool(self, policy: Policy, pack: Pack) -> Mapping[str, tuple[float, float]]:
        """Return what `inner` pools, and by what each other objective is divided beside it."""
        inner = dict(self.inner.pool(policy, pack)) if self.inner.pools else {}
        return inner | self._shares(pack)

    def loss(self, policy: Policy, pack: Pack) -> Loss:
        """Return the sum of all parts, each scaled to the weight of `inner`."""
        once = CachedPolicy(policy, pack, self._taught(pack))
        loss = self.inner.loss(once, pack)
        total, metrics = loss.total, dict(loss.metrics)
        shares = pack.pooled or {name: _quotient(*share) for name, share in self._shares(pack).items()}
        for name, (factor, objective) in self.others.items():
            if once.first is None:
                metrics[name] = loss.total.new_zeros(()), 0.0
                continue
            part = objective.loss(once, once.first)
            total = total + factor * shares[_share(name)] * part.total
            metrics[name] = part.total.detach(), part.weight
        return Loss(total, loss.weight, metrics)

    def _taught(self, pack: Pack) -> list[int]:
        return [place for place, tree in enumerate(pack.trees) if self.inner.imitable(tree)]

    def _shares(self, pack: Pack) -> dict[str, tuple[float, float]]:
        inner = sum(map(self.inner.weigh, pack.trees))
        firsts = [
            replace(pack.trees[place], branches=pack.trees[place].branches[:1])
            for place in self._taught(pack)
        ]
        return {
            _share(name): (inner, sum(map(objective.weigh, firsts)))
            for name, (_, objective) in self.others.items()
        }


def with_auxiliary(objective: Objective, others: Mapping[str, Any]) -> Objective:
    """Return `objective` with a weight of others, as the option ``auxiliary`` names them.

    Args:
        objective: The main one.
        others: Name → weight, or → options with a ``weight``.

    Raises:
        ConfigError: A weight is missing or not positive, or the other cannot see a completion by itself.
    """
    if not others:
        return objective
    if not objective.takes_auxiliary:
        raise ConfigError(
            "auxiliary: an objective that learns from its own answers has no completions to teach"
        )
    parts = {}
    for name, given in others.items():
        options = dict(given) if isinstance(given, Mapping) else {"weight": given}
        weight = options.pop("weight", None)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ConfigError(
                f"auxiliary.{name}: expected a weight above 0, e.g. auxiliary.{name}=0.2, got {weight!r}"
            )
        part: Objective = configs.build_method("objective", {"name": str(name), **options})
        if part.needs_reference or part.pools or len(part.branch_names) > 1:
            raise ConfigError(
                f"auxiliary.{name}: {name} is not about one completion by itself; make it objective={name}"
            )
        parts[str(name)] = float(weight), part
    return WithAuxiliary(objective, parts)


def objective_of(config: DictConfig) -> Objective:
    """Return the objective of a run, with those that it is combined with."""
    return with_auxiliary(configs.build("objective", config.objective), config.get("auxiliary") or {})


def _quotient(value: float, weight: float) -> float:
    return value / weight if weight else 0.0


def _share(name: str) -> str:
    return f"share of {name}"
