"""Token trees, packs of them without padding, and the cut of a step's trees into packs."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from luthier.errors import DataError
from luthier.trees.layout import Segment, TreeSpans


@dataclass(frozen=True)
class Branch:
    """One continuation of a prompt.

    Attributes:
        ids: Its token ids, at least one.
        scored: Which of them are predicted (supervised); None for all.
        notes: Numbers of the scored tokens by name, one each: what a rollout found of them.
    """

    ids: tuple[int, ...]
    scored: tuple[bool, ...] | None = None
    notes: Mapping[str, tuple[float, ...]] = field(default_factory=dict, hash=False)

    @property
    def scored_places(self) -> list[int]:
        """Places in `ids` of the tokens that are predicted."""
        if self.scored is None:
            return list(range(len(self.ids)))
        return [place for place, scored in enumerate(self.scored) if scored]


@dataclass(frozen=True)
class Tree:
    """A prompt and the branches that continue it: one training example of any objective.

    Attributes:
        prompt: Token ids of the root, at least one.
        branches: Its children, in the order the objective gave them.
        origin: Where the example came from (file:line), for messages.
        values: Numbers that belong to the tree (labels, margins, rewards).

    Raises:
        DataError: An empty prompt or branch, or a mask of another length than its tokens.
    """

    prompt: tuple[int, ...]
    branches: tuple[Branch, ...] = ()
    origin: str = ""
    values: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Refuse what no pack can hold."""
        where = f"{self.origin}: " if self.origin else ""
        if not self.prompt:
            raise DataError(
                f"{where}the prompt has no tokens, but the first token needs one to be predicted from"
            )
        for number, branch in enumerate(self.branches, 1):
            if not branch.ids:
                raise DataError(f"{where}completion {number} has no tokens; drop the row or give it a text")
            if branch.scored is not None and len(branch.scored) != len(branch.ids):
                raise DataError(
                    f"{where}the mask of completion {number} has {len(branch.scored)} entries "
                    f"for {len(branch.ids)} tokens; it needs one for each"
                )

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and of all branches: what a pack must hold."""
        return len(self.prompt) + sum(len(branch.ids) for branch in self.branches)

    @property
    def scored_tokens(self) -> int:
        """How many tokens are predicted."""
        return sum(len(branch.scored_places) for branch in self.branches)


@dataclass(frozen=True)
class Pack:
    """Trees laid end to end in one row of T tokens, with N scored tokens in C children.

    Attributes:
        trees: What it holds, in order.
        input_ids: (1, T) int64.
        position_ids: (1, T) int64; a root starts at 0, each child at its prompt's length.
        positions: (N,) int64, places of the hidden states that predict the scored tokens.
        targets: (N,) int64, the scored tokens.
        places: (N,) int64, places of the scored tokens themselves.
        ends: (C,) int64, the place of every child's last token.
        offsets: C + 1 host integers; child c owns scored tokens ``offsets[c]:offsets[c + 1]``.
        tree_of: C host integers, the tree of every child.
        spans: The attention layout.
        pooled: What `Objective.pool` found over the whole step; None where the pack is the whole step.
    """

    trees: tuple[Tree, ...]
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    places: torch.Tensor
    ends: torch.Tensor
    offsets: tuple[int, ...]
    tree_of: tuple[int, ...]
    spans: TreeSpans
    pooled: Mapping[str, float] | None = None
    _only: dict[int, "Pack"] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        trees: Sequence[Tree],
        device: torch.device | str = "cpu",
        pooled: Mapping[str, float] | None = None,
    ) -> "Pack":
        """Lay `trees` end to end on `device`.

        Raises:
            DataError: There is no tree.
        """
        if not trees:
            raise DataError("a pack needs at least one tree")
        ids: list[int] = []
        depths: list[int] = []
        positions: list[int] = []
        places: list[int] = []
        ends: list[int] = []
        offsets = [0]
        segments: list[Segment] = []
        for tree in trees:
            root, shift = len(ids), len(tree.prompt)
            segments.extend(_segments(tree, root))
            ids.extend(tree.prompt)
            depths.extend(range(shift))
            for branch in tree.branches:
                start, scored = len(ids), branch.scored_places
                # The prompt's last token predicts the first token of every child.
                positions.extend(start + place - 1 if place else root + shift - 1 for place in scored)
                places.extend(start + place for place in scored)
                offsets.append(len(places))
                ids.extend(branch.ids)
                ends.append(len(ids) - 1)
                depths.extend(range(shift, shift + len(branch.ids)))

        def numbers(of: Sequence[int]) -> torch.Tensor:
            return torch.tensor(of, dtype=torch.int64, device=device)

        return cls(
            trees=tuple(trees),
            input_ids=numbers(ids)[None],
            position_ids=numbers(depths)[None],
            positions=numbers(positions),
            targets=numbers([ids[place] for place in places]),
            places=numbers(places),
            ends=numbers(ends),
            offsets=tuple(offsets),
            tree_of=tuple(index for index, tree in enumerate(trees) for _ in tree.branches),
            spans=TreeSpans(tuple(segments)),
            pooled=pooled,
        )

    def only(self, child: int) -> "Pack":
        """Return the pack of the same trees, each with its branch number `child` alone; always one object."""
        if child not in self._only:
            trees = [replace(tree, branches=(tree.branches[child],)) for tree in self.trees]
            self._only[child] = Pack.of(trees, self.input_ids.device, self.pooled)
        return self._only[child]

    def notes(self, name: str) -> torch.Tensor:
        """Return (N,) float32, what the branches have noted as `name` of their scored tokens.

        Raises:
            DataError: A branch has no such note of each of them.
        """
        branches = [branch for tree in self.trees for branch in tree.branches]
        values = [value for branch in branches for value in branch.notes.get(name, ())]
        if len(values) != self.scored_tokens:
            raise DataError(f"{self.trees[0].origin}: its tokens have no '{name}' each; they are no rollout")
        return torch.tensor(values, dtype=torch.float32, device=self.input_ids.device)

    def noted(self, notes: Mapping[str, torch.Tensor]) -> list[Tree]:
        """Return the trees with `notes`, (N,) by name, beside those that they have."""
        lengths = [b - a for a, b in zip(self.offsets, self.offsets[1:], strict=False)]
        parts = {name: torch.split(values.float().cpu(), lengths) for name, values in notes.items()}
        children = itertools.count()
        trees = []
        for tree in self.trees:
            branches = []
            for branch, child in zip(tree.branches, children, strict=False):
                own = {name: tuple(part[child].tolist()) for name, part in parts.items()}
                branches.append(replace(branch, notes={**branch.notes, **own}))
            trees.append(replace(tree, branches=tuple(branches)))
        return trees

    @property
    def tokens(self) -> int:
        """T, real tokens all of them."""
        return self.input_ids.shape[1]

    @property
    def scored_tokens(self) -> int:
        """N, without asking the device."""
        return self.offsets[-1]


def cut(trees: Sequence[Tree], pack_tokens: int, multiple: int = 1) -> list[list[int]]:
    """Partition the indices of `trees` into few packs of at most `pack_tokens` tokens, of about equal size.

    Greedy, and the same for the same arguments. A tree that is larger than `pack_tokens` is a pack alone.

    Args:
        trees: What to pack.
        pack_tokens: Tokens a pack may hold.
        multiple: Make the number of packs a multiple of this, where there are enough trees for it.
    """
    sizes = [tree.tokens for tree in trees]
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    alone = [[index] for index in order if sizes[index] > pack_tokens]
    rest = order[len(alone) :]
    fewest = math.ceil(sum(sizes[index] for index in rest) / pack_tokens)
    packs = _first_fit(rest, sizes, pack_tokens)
    for count in range(fewest, len(packs) + 1):
        level = _levelled(rest, sizes, count)
        if max((sum(sizes[index] for index in pack) for pack in level), default=0) <= pack_tokens:
            packs = level
            break
    packs = alone + packs
    while len(packs) % multiple and any(len(pack) > 1 for pack in packs):
        largest = max((pack for pack in packs if len(pack) > 1), key=lambda pack: sum(sizes[i] for i in pack))
        packs.remove(largest)
        packs += _levelled(sorted(largest, key=lambda index: -sizes[index]), sizes, 2)
    return sorted(sorted(pack) for pack in packs)


def _segments(tree: Tree, root: int) -> list[Segment]:
    shift = len(tree.prompt)
    first = len(tree.branches[0].ids) if tree.branches else 0
    segments = [Segment(root, root + shift + first)]
    for branch in tree.branches[1:]:
        start = segments[-1].stop
        segments.append(Segment(start, start + len(branch.ids), root, shift))
    return segments


def _first_fit(order: list[int], sizes: list[int], budget: int) -> list[list[int]]:
    packs: list[list[int]] = []
    room: list[int] = []
    for index in order:
        place = next((place for place, free in enumerate(room) if free >= sizes[index]), len(packs))
        if place == len(packs):
            packs.append([])
            room.append(budget)
        packs[place].append(index)
        room[place] -= sizes[index]
    return packs


def _levelled(order: list[int], sizes: list[int], count: int) -> list[list[int]]:
    packs: list[list[int]] = [[] for _ in range(count)]
    load = [0] * count
    for index in order:
        place = load.index(min(load))
        packs[place].append(index)
        load[place] += sizes[index]
    return packs
