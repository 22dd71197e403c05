"""From rows to trees: encoded once, counted, and nothing dropped in silence."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from luthier.codec import Codec
from luthier.data_source import DataSource, Row
from luthier.errors import DataError
from luthier.objective import Objective
from luthier.tree import Tree


@dataclass(frozen=True)
class Encoded:
    """The trees of a data source, and what became of its rows.

    Attributes:
        trees: One tree a row that is used.
        rows: The rows, in the trees' order.
        dropped: Reason → number of rows left out for it.
    """

    trees: list[Tree]
    rows: list[Row]
    dropped: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.trees)

    @property
    def tokens(self) -> int:
        """Tokens of all trees."""
        return sum(tree.tokens for tree in self.trees)

    @property
    def scored_tokens(self) -> int:
        """Supervised tokens of all trees."""
        return sum(tree.scored_tokens for tree in self.trees)

    def without(self, others: Encoded) -> Encoded:
        """Leave out the rows that are among `others`: a held-out row must not be trained on.

        Rows with a prompt are the same if their prompts are; of conversations, which may well begin alike,
        everything must be.
        """
        seen = set(others._keys())
        kept = [i for i, key in enumerate(self._keys()) if key not in seen]
        dropped = Counter(self.dropped)
        if len(kept) < len(self):
            dropped["also in eval_data"] += len(self) - len(kept)
        return Encoded([self.trees[i] for i in kept], [self.rows[i] for i in kept], dropped)

    def _keys(self) -> Iterator[object]:
        for tree, row in zip(self.trees, self.rows, strict=True):
            whole = (tree.prompt, tuple(branch.ids for branch in tree.branches))
            yield tree.prompt if "prompt" in row.fields else whole

    def summary(self) -> str:
        """Return the line of the run's header: rows, tokens, share supervised, rows dropped and why."""
        share = 100 * self.scored_tokens / max(self.tokens, 1)
        line = f"{len(self):,} rows · {self.tokens:,} tokens, {share:.0f} % supervised"
        left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        return f"{line} · dropped: {left_out}" if left_out else line


def encode(source: DataSource, objective: Objective, codec: Codec, max_length: int) -> Encoded:
    """Encode every row of `source`; rows longer than `max_length` tokens are dropped and counted.

    Raises:
        DataError: A row is malformed, or none is left.
    """
    encoded = Encoded([], [])
    for row in source.rows():
        try:
            tree = objective.encode(row, codec)
        except (TypeError, UnicodeError) as error:
            raise DataError(f"{row.origin}: the tokenizer refuses the text: {error}") from error
        longest = len(tree.prompt) + max((len(branch.ids) for branch in tree.branches), default=0)
        if longest > max_length:
            encoded.dropped[f"longer than {max_length} tokens"] += 1
        elif not tree.scored_tokens:
            encoded.dropped["without a supervised token"] += 1
        else:
            encoded.trees.append(tree)
            encoded.rows.append(row)
    if not encoded.trees:
        left_out = ", ".join(f"{count} {reason}" for reason, count in encoded.dropped.items())
        raise DataError(f"the data holds no usable row ({left_out or 'it is empty'})")
    return encoded


@dataclass(frozen=True)
class Sampler:
    """Batches of example indices: a new permutation every epoch, a function of seed and epoch alone.

    Attributes:
        size: Number of examples.
        batch_size: Examples a step; the last step of an epoch may have fewer.
        shuffle: Permute, or keep the order of the data.
        seed: Seed of the permutations.
    """

    size: int
    batch_size: int
    shuffle: bool
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one pass over the data."""
        return -(-self.size // self.batch_size)

    def batch(self, step: int) -> Sequence[int]:
        """Return the indices of the step that follows `step` ones."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _order(self.size, self.seed, epoch) if self.shuffle else range(self.size)
        return order[place * self.batch_size : (place + 1) * self.batch_size]


@functools.lru_cache(maxsize=1)
def _order(size: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(size, generator=generator).tolist()
    return order
