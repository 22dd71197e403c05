"""Objectives that add something to another one and are that one in all else."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.contracts import Loss, Objective, Row
from luthier.policy import Policy
from luthier.system import Watch
from luthier.text import Codec
from luthier.trees import Pack, Tree


@dataclass(frozen=True)
class Wrapped(Objective):
    """`inner` as it is, in every public name that `Objective` has: a base for what adds to an objective."""

    inner: Objective

    def encode(self, row: Row, codec: Codec) -> Tree | Sequence[Tree]:
        """See `inner`."""
        return self.inner.encode(row, codec)

    def loss(self, policy: Policy, pack: Pack) -> Loss:
        """See `inner`."""
        return self.inner.loss(policy, pack)


def _method(name: str) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: getattr(self.inner, name)(*args, **kwargs)


def _attribute(name: str) -> property:
    return property(lambda self: getattr(self.inner, name))


# Every other name, so that one that `Objective` gets later is the inner objective's too.
for _name, _value in vars(Objective).items():
    if not _name.startswith("_") and _name not in vars(Wrapped):
        setattr(Wrapped, _name, (_method if callable(_value) else _attribute)(_name))
abc.update_abstractmethods(Wrapped)


@dataclass(frozen=True)
class Watched(Wrapped):
    """`inner`, and a look at memory after every loss, when activations are at their most."""

    watch: Watch

    def loss(self, policy: Policy, pack: Pack) -> Loss:
        """Return the loss of `inner`."""
        loss = super().loss(policy, pack)
        self.watch.look(pack.tokens)
        return loss
