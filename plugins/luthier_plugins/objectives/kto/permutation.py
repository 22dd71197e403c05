"""A random permutation that leaves nobody in their own group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch

from luthier import DataError


def derangement(groups: Sequence[Hashable], generator: torch.Generator) -> list[int]:
    """Return for each place another one of another group, every place being used once.

    Groups are laid end to end in a random order, and everybody looks as far ahead as the largest group is
    long, around the end. Where that group is more than half of all, no such permutation exists: its members
    take those of the others in turn, which so are used more than once.

    Args:
        groups: The group of each place, e.g. the prompt of each completion.
        generator: Decides the order.

    Raises:
        DataError: There is one group.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for place in torch.randperm(len(groups), generator=generator).tolist():
        members[groups[place]].append(place)
    if len(members) < 2:
        raise DataError(f"all {len(groups):,} rows have one prompt: there is no completion of another one")
    largest = max(members.values(), key=len)
    ring = [place for group in members.values() for place in group]
    partners = [0] * len(groups)
    if 2 * len(largest) <= len(groups):
        for spot, place in enumerate(ring):
            partners[place] = ring[(spot + len(largest)) % len(ring)]
        return partners
    others = [place for group in members.values() if group is not largest for place in group]
    for spot, place in enumerate(largest):
        partners[place] = others[spot % len(others)]
    for place, other in zip(others, largest, strict=False):
        partners[place] = other
    return partners
