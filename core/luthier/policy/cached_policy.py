"""A policy for several objectives on one pack: the model runs once, whoever asks first."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from luthier.policy.policy import Logprobs, Policy
from luthier.trees import Pack


class CachedPolicy:
    """`policy`, which runs `pack` once for all that ask for it or for some first branches of it.

    Attributes:
        first: The first branches of the trees at `places` alone; None without any.
    """

    def __init__(self, policy: Policy, pack: Pack, places: Sequence[int]) -> None:
        self._policy, self._pack, self._places = policy, pack, places
        self._known: list[tuple[Pack, Logprobs]] = []
        firsts = pack.only(0).trees
        taught = [firsts[place] for place in places]
        self.first = Pack.of(taught, pack.input_ids.device) if taught else None

    def logprobs(self, pack: Pack) -> Logprobs:
        """Return what the policy gives, or gave, for the pack."""
        for known, logprobs in self._known:
            if known is pack:
                return logprobs
            if pack is self.first and (known is self._pack or known is self._pack.only(0)):
                return logprobs.children([known.tree_of.index(place) for place in self._places])
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

    def valued(self, pack: Pack) -> tuple[Logprobs, torch.Tensor]:
        """See `Policy.valued`."""
        return self._policy.valued(pack)
