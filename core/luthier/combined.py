"""One objective and a share of others on the same forward pass: DPO with some SFT on what was chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
        for name in ("needs_reference", "pools", "branch_names", "holds"):
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

    def complete(self, trees: Sequence[Tree], generator: torch.Generator) -> Iterable[Tree]:
        """See `inner`."""
        return self.inner.complete(trees, generator)

    def findings(self, trees: Sequence[Tree]) -> Sequence[Finding]:
        """See `inner`."""
        return self.inner.findings(trees)

    def pool(self, policy: Policy, pack: Pack) -> Mapping[str, tuple[float, float]]:
        """See `inner`."""
        return self.inner.pool(policy, pack)


@dataclass(frozen=True)
class Combined(Wrapped):
    """``L = L_inner + Σ wᵢ·Lᵢ``, each a mean over the whole step by its own weight.

    The others see the first branch of every tree: the chosen completion of a pair.

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
        once = _Once(policy, pack)
        loss = self.inner.loss(once, pack)
        total, metrics = loss.total, dict(loss.metrics)
        shares = pack.pooled or {name: value / weight for name, (value, weight) in self._shares(pack).items()}
        for name, (factor, objective) in self.others.items():
            part = objective.loss(once, once.first)
            total = total + factor * shares[_share(name)] * part.total
            metrics[name] = part.total.detach(), part.weight
        return Loss(total, loss.weight, metrics)

    def _shares(self, pack: Pack) -> dict[str, tuple[float, float]]:
        inner = sum(map(self.inner.weigh, pack.trees))
        firsts = pack.only(0).trees
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
    parts = {}
    for name, given in others.items():
        options = dict(given) if isinstance(given, Mapping) else {"weight": given}
        weight = options.pop("weight", None)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
            raise ConfigError(f"also.{name}: expected a weight above 0, e.g. also.{name}=0.2, got {weight!r}")
        part: Objective = configs.build_method("objective", {"name": str(name), **options})
        if part.needs_reference or part.pools or len(part.branch_names) > 1:
            raise ConfigError(
                f"also.{name}: {name} is not about one completion by itself; make it objective={name}"
            )
        parts[str(name)] = float(weight), part
    return Combined(objective, parts)


class _Once(Policy):
    """A policy whose pack runs once, however many objectives ask for it or for its first branches."""

    def __init__(self, policy: Policy, pack: Pack) -> None:
        self._policy, self._pack, self.first = policy, pack, pack.only(0)
        self._known: Logprobs | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def logprobs(self, pack: Pack) -> Logprobs:
        """Return what the policy gave for the pack, or that of the first branches."""
        if pack is not self._pack and pack is not self.first:
            return self._policy.logprobs(pack)
        if self._known is None:
            self._known = self._policy.logprobs(self._pack)
        if pack is self._pack:
            return self._known
        places = [self._pack.tree_of.index(tree) for tree in range(len(pack.trees))]
        return self._known.children(places)

    def reference(self, pack: Pack) -> torch.Tensor:
        """See `Policy.reference`."""
        return self._policy.reference(pack)

    def hidden(self, pack: Pack, positions: torch.Tensor) -> torch.Tensor:
        """See `Policy.hidden`."""
        return self._policy.hidden(pack, positions)


def _share(name: str) -> str:
    return f"share of {name}"
