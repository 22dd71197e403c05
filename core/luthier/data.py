"""From rows to trees: encoded once, counted, and nothing dropped in silence."""

from __future__ import annotations

import functools
import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from luthier.codec import Codec
from luthier.data_source import DataSource, Row
from luthier.errors import DataError
from luthier.formats import laid_out
from luthier.objective import Objective
from luthier.overflow import fit
from luthier.row_filter import RowFilter
from luthier.tree import Tree
from luthier.tree_store import TreeStore


@dataclass(frozen=True)
class Encoded:
    """The trees of a data source, and what became of its rows.

    Attributes:
        trees: One tree a row that is used.
        rows: The rows, in the trees' order; none where they were not to be kept.
        keys: For every tree a hash of what makes its row the same as another.
        dropped: Reason → number of rows left out for it.
        truncated: Reason → number of rows cut for it.
    """

    trees: TreeStore = field(default_factory=TreeStore)
    rows: list[Row] = field(default_factory=list)
    keys: array[int] = field(default_factory=lambda: array("q"))
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.trees)

    @property
    def tokens(self) -> int:
        """Tokens of all trees."""
        return int(self.trees.lengths().sum())

    @property
    def scored_tokens(self) -> int:
        """Supervised tokens of all trees."""
        return int(self.trees.scored().sum())

    def digests(self) -> torch.Tensor:
        """Return a stable hash of every tree's contents, (n,) int64, in order."""
        return self.trees.digests()

    def without(self, others: Encoded) -> Encoded:
        """Leave out the rows that are among `others`: a held-out row must not be trained on.

        Rows with a prompt are the same if their prompts are; of conversations, which may well begin alike,
        everything must be.
        """
        seen = set(others.keys)
        kept = [i for i, key in enumerate(self.keys) if key not in seen]
        dropped = Counter(self.dropped)
        if len(kept) < len(self):
            dropped["also in eval_data"] += len(self) - len(kept)
        rows = [self.rows[i] for i in kept] if self.rows else []
        keys = array("q", (self.keys[i] for i in kept))
        return Encoded(self.trees.select(kept), rows, keys, dropped, Counter(self.truncated))

    def lines(self, label: str) -> list[str]:
        """Return the lines of the run's header: what is used under `label`, then what is not, and why."""
        used, *rest = self._parts()
        return [f"{label:<10}{used}", *(f"{'':<10}{part}" for part in rest)]

    def summary(self) -> str:
        """Return the same in one line."""
        return " · ".join(self._parts())

    def _parts(self) -> Iterator[str]:
        count, tokens = len(self), self.tokens
        share = 100 * self.scored_tokens / max(tokens, 1)
        longest = int(self.trees.lengths().max()) if count else 0
        yield (
            f"{count:,} rows · {tokens:,} tokens, {share:.0f} % supervised · "
            f"{tokens / max(count, 1):,.0f} a row, longest {longest:,}"
        )
        for name, reasons in (("dropped", self.dropped), ("truncated", self.truncated)):
            if reasons:
                yield f"{name}: {_counted(reasons)}"


def read(
    source: DataSource, chat: bool, filters: Sequence[RowFilter], dropped: Counter[str]
) -> Iterator[Row]:
    """Yield the rows of `source` as objectives take them: renamed, laid out, filtered.

    Args:
        source: Where the rows come from.
        chat: Whether instructions become chat messages: the tokenizer has a template.
        filters: See every row, one after the other.
        dropped: Counts the rows that a filter drops, by reason.

    Raises:
        DataError: A row is malformed.
    """
    for row in source.rows():
        kept: Row | str = laid_out(row, source, chat)
        for one in filters:
            if isinstance(kept, Row):
                kept = one.keep(kept)
        if isinstance(kept, Row):
            yield kept
        else:
            dropped[kept] += 1


def encode(
    source: DataSource,
    objective: Objective,
    codec: Codec,
    max_length: int,
    overflow: str = "drop",
    filters: Sequence[RowFilter] = (),
    keep_rows: bool = True,
) -> Encoded:
    """Encode every row of `source`; what is left out or cut is counted.

    Args:
        source: Where the rows come from.
        objective: Makes a tree of a row.
        codec: Renders and tokenises.
        max_length: Longest path of a tree, in tokens.
        overflow: What becomes of longer ones, see `luthier.overflow.fit`.
        filters: Row filters, in order.
        keep_rows: Remember the rows themselves, which verifying answers needs and training does not.

    Raises:
        DataError: A row is malformed or, with ``overflow="refuse"``, too long; or none is left.
    """
    encoded = Encoded()
    for row in read(source, codec.has_template, filters, encoded.dropped):
        try:
            tree = objective.encode(row, codec)
        except (TypeError, UnicodeError) as error:
            raise DataError(f"{row.origin}: the tokenizer refuses the text: {error}") from error
        fitted, reason = fit(tree, max_length, overflow, codec.tokenizer.bos_token_id)
        if fitted is None:
            encoded.dropped[reason] += 1
        elif not fitted.scored_tokens:
            encoded.dropped["without a supervised token"] += 1
        else:
            encoded.truncated.update([reason] if reason else [])
            encoded.trees.append(fitted)
            encoded.keys.append(_key(row, tree))
            if keep_rows:
                encoded.rows.append(row)
    if not len(encoded):
        raise DataError(f"the data holds no usable row ({_counted(encoded.dropped) or 'it is empty'})")
    return encoded


def _key(row: Row, tree: Tree) -> int:
    """Return a hash of what is compared: the prompt where a row has one, else all tokens."""
    prompt = row.fields.get("prompt")
    what = [branch.ids for branch in tree.branches] if prompt is None else prompt
    head = tree.prompt if prompt is None else None
    text = json.dumps([head, what], sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))


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
        first, last = place * self.batch_size, min((place + 1) * self.batch_size, self.size)
        if not self.shuffle:
            return range(first, last)
        batch: list[int] = _order(self.size, self.seed, epoch)[first:last].tolist()
        return batch


@functools.lru_cache(maxsize=1)
def _order(size: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
