"""One objective and a share of others on the same forward pass: DPO with some SFT on what was chosen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from luthier import config as configs
from luthier.codec import Codec
from luthier.data_source import Row
from luthier.errors import ConfigError
from luthier.objective import Finding, Loss, Objective
from luthier.policy import Logprobs, Policy
from luthier.tree import Pack, Tree


@dataclass(frozen=True)
class Wrapped(Objective):
    """`inner` as it is: a base for what adds to an objective."""

    inner: Objective

    def __post_init__(self) -> None:
        """Be what `inner` is."""
        for name in ("needs_reference", "head", "pools", "online", "branch_names", "holds"):
            object.__setattr__(self, name, getattr(self.inner, name))

    def encode(self, row: Row, codec: Codec) -> Tree | Sequence[Tree]:
        """See `inner`."""
        return self.inner.encode(row, codec)

    def loss(self, policy: Policy, pack: Pack) -> Loss:
        """See `inner`."""
        return self.inner.loss(policy, pack)

    def weigh(self, tree: Tree) -> float:
        """See `inner`."""
        return self.inner.weigh(tree)

    def fault(self, tree: Tree) -> str | None:
        """See `inner`."""
        return self.inner.fault(tree)

    def imitable(self, tree: Tree) -> bool:
        """See `inner`."""
        return self.inner.imitable(tree)

    def check(self, trees: Sequence[Tree]) -> None:
        """See `inner`."""
        self.inner.check(trees)

    def complete(self, trees: Sequence[Tree], generator: torch.Generator) -> Iterable[Tree]:
        """See `inner`."""
        return self.inner.complete(trees, generator)

    def findings(self, trees: Sequence[Tree]) -> Sequence[Finding]:
        """See `inner`."""
        return self.inner.findings(trees)

    def pool(self, policy: Policy, pack: Pack) -> Mapping[str, tuple[float, float]]:
        """See `inner`."""
        return self.inner.pool(policy, pack)

    def summarise(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """See `inner`."""
        return self.inner.summarise(means)

    def draw(self, metrics: Mapping[str, float], folder: Path) -> None:
        """See `inner`."""
        self.inner.draw(metrics, folder)


@dataclass(frozen=True)
class Combined(Wrapped):
    """``L = L_inner + Σ wᵢ·Lᵢ``, each a mean over the whole step by its own weight.

    The others see the first branch of every tree that is imitable: the chosen completion of a pair, a
    desirable one.

    Attributes:
        others: Name → factor and objective.
    """

    others: Mapping[str, tuple[float, Objective]]

    def __post_init__(self) -> None:
        """Pool: every part is divided by a weight of its own."""
        super().__post_init__()
        object.__setattr__(self, "pools", True)

    def pool(self, policy: Policy, pack: Pack) -> Mapping[str, tuple[float, float]]:
        """Return what `inner` pools, and by what each other objective is divided beside it."""
        inner = dict(self.inner.pool(policy, pack)) if self.inner.pools else {}
        return inner | self._shares(pack)

    def loss(self, policy: Policy, pack: Pack) -> Loss:
        """Return the sum of all parts, each scaled to the weight of `inner`."""
        once = _Once(policy, pack, self._taught(pack))
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


def combined(objective: Objective, others: Mapping[str, Any]) -> Objective:
    """Return `objective` with a weight of others, as the option ``also`` names them.

    Args:
        objective: The main one.
        others: Name → weight, or → options with a ``weight``.

    Raises:
        ConfigError: A weight is missing or not positive, or the other cannot see a completion by itself.
    """
    if not others:
        return objective
    if objective.online:
        raise ConfigError("also: an objective that learns from its own answers has no completions to teach")
    parts = {}
    for name, given in others.items():
        options = dict(given) if isinstance(given, Mapping) else {"weight": given}
        weight = options.pop("weight", None)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ConfigError(f"also.{name}: expected a weight above 0, e.g. also.{name}=0.2, got {weight!r}")
        part: Objective = configs.build_method("objective", {"name": str(name), **options})
        if part.needs_reference or part.pools or len(part.branch_names) > 1:
            raise ConfigError(
                f"also.{name}: {name} is not about one completion by itself; make it objective={name}"
            )
        parts[str(name)] = float(weight), part
    return Combined(objective, parts)


class _Once(Policy):
    """A policy that runs a pack once, however many objectives ask for it or for some first branches of it.

    Attributes:
        first: The first branches of the trees at `places` alone; None without any.
    """

    def __init__(self, policy: Policy, pack: Pack, places: Sequence[int]) -> None:
        self._policy, self._pack, self._places = policy, pack, places
        self._known: list[tuple[Pack, Logprobs]] = []
        firsts = pack.only(0).trees
        device = pack.input_ids.device
        self.first = Pack.of([firsts[place] for place in places], device) if places else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def logprobs(self, pack: Pack) -> Logprobs:
        """Return what the policy gives, or gave, for the pack."""
        for known, found in self._known:
            if known is pack:
                return found
            if pack is self.first and (known is self._pack or known is self._pack.only(0)):
                return found.children([known.tree_of.index(place) for place in self._places])
        self._known.append((pack, self._policy.logprobs(pack)))
        return self._known[-1][1]

    def reference(self, pack: Pack) -> torch.Tensor:
        """See `Policy.reference`."""
        return self._policy.reference(pack)

    def hidden(self, pack: Pack, positions: torch.Tensor) -> torch.Tensor:
        """See `Policy.hidden`."""
        return self._policy.hidden(pack, positions)

    def scores(self, pack: Pack, positions: torch.Tensor) -> torch.Tensor:
        """See `Policy.scores`."""
        return self._policy.scores(pack, positions)


def _quotient(value: float, weight: float) -> float:
    return value / weight if weight else 0.0


def _share(name: str) -> str:
    return f"share of {name}"
