"""From rows to trees: encoded once, counted, and nothing dropped in silence."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch

from luthier.contracts import DataSource, Objective, Row, RowFilter
from luthier.data.formats import asked, laid_out
from luthier.errors import DataError, UnusableRowError
from luthier.policy import check_known
from luthier.text import Codec
from luthier.trees import Tree, TreeStore, fit

NAMED = 3
"""Rows that are named of those that nothing can be learned from."""


@dataclass(frozen=True)
class Encoded:
    """The trees of a data source, and what became of its rows.

    Attributes:
        trees: One tree a row that is used.
        rows: The rows, in the trees' order; none where they were not to be kept.
        keys: For every tree a hash of what makes its row the same as another.
        dropped: Reason → number of rows left out for it.
        truncated: Reason → number of rows cut for it.
        noted: What a person should know of rows that are used → their number.
        named: Reason → the first rows that it is about.
        notes: What else a person should know of the data, a line each.
    """

    trees: TreeStore = field(default_factory=TreeStore)
    rows: list[Row] = field(default_factory=list)
    keys: array[int] = field(default_factory=lambda: array("q"))
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

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

    def without(self, others: Encoded, unusable: str = "drop") -> Encoded:
        """Leave out the rows that are among `others`: a held-out row must not be trained on.

        Rows with a prompt are the same if their prompts are; of conversations, which may well begin alike,
        everything must be.

        Raises:
            DataError: There are some, and `unusable` says refuse.
        """
        seen, reason = set(others.keys), "also in eval_data"
        kept = [i for i, key in enumerate(self.keys) if key not in seen]
        shared = [i for i, key in enumerate(self.keys) if key in seen]
        dropped, named = Counter(self.dropped), dict(self.named)
        if shared:
            dropped[reason] += len(shared)
            named[reason] = [self.trees[i].origin for i in shared[:NAMED]]
            if unusable == "refuse":
                which = f"{', '.join(named[reason])}{' …' if len(shared) > NAMED else ''}"
                raise DataError(
                    f"{len(shared):,} rows of data are also in eval_data ({which}); leave them out of one"
                )
        rows = [self.rows[i] for i in kept] if self.rows else []
        keys = array("q", (self.keys[i] for i in kept))
        trees = self.trees.select(kept)
        return replace(self, trees=trees, rows=rows, keys=keys, dropped=dropped, named=named)

    def completed(
        self, objective: Objective, seed: int, unusable: str = "drop", training: bool = False
    ) -> Encoded:
        """Return them with what `objective` gives trees of each other, and what it finds in them.

        Raises:
            DataError: The data as a whole cannot be learned from; or it has a fault and they are refused.
        """
        if training:
            objective.check(self.trees)
        findings = objective.findings(self.trees)
        if faults := [finding.text for finding in findings if finding.refusable and unusable == "refuse"]:
            raise DataError(f"{faults[0]}; mend the data, or choose unusable=drop")
        trees = objective.complete(self.trees, torch.Generator().manual_seed(seed))
        store = trees if isinstance(trees, TreeStore) else TreeStore(trees)
        return replace(self, trees=store, notes=tuple(finding.text for finding in findings))

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
            f"{count:,} row{'s' * (count != 1)} · {tokens:,} tokens, {share:.0f} % supervised · "
            f"{tokens / max(count, 1):,.0f} a row, longest {longest:,}"
        )
        for name, reasons in (
            ("dropped", self.dropped),
            ("truncated", self.truncated),
            ("noted", self.noted),
        ):
            if reasons:
                yield f"{name}: {_counted(reasons, self.named)}"
        yield from self.notes


def read(
    source: DataSource,
    chat: bool,
    filters: Sequence[RowFilter],
    dropped: Counter[str],
    unusable: str = "drop",
) -> Iterator[Row]:
    """Yield the rows of `source` as objectives take them: renamed, laid out, filtered.

    Args:
        source: Where the rows come from.
        chat: Whether instructions become chat messages: the tokenizer has a template.
        filters: See every row, one after the other.
        dropped: Counts the rows that a filter drops, by reason, and those that nobody can use.
        unusable: ``drop`` or ``refuse`` the latter.

    Raises:
        DataError: A row is malformed.
    """
    for row in source.rows():
        try:
            kept: Row | str = laid_out(row, source, chat)
        except UnusableRowError as error:
            if unusable == "refuse":
                raise
            kept = error.reason
        for row_filter in filters:
            if isinstance(kept, Row):
                kept = row_filter.keep(kept)
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
    unusable: str = "drop",
    vocabulary: int | None = None,
) -> Encoded:
    """Encode every row of `source`; what is left out or cut is counted.

    Args:
        source: Where the rows come from.
        objective: Makes a tree, or several, of a row.
        codec: Renders and tokenises.
        max_length: Longest path of a tree, in tokens.
        overflow: What becomes of longer ones, see `luthier.trees.truncation.fit`.
        filters: Row filters, in order.
        keep_rows: Remember the rows themselves, which verifying answers needs and training does not.
        unusable: ``drop`` or ``refuse`` rows that nothing can be learned from.
        vocabulary: Tokens that the model has a row of its embedding for; None: that is not known.

    Raises:
        DataError: A row is malformed, has a token that the model does not know, or is too long or unusable
            where that is refused; or none is left.
    """
    encoded = Encoded()
    for row in read(source, codec.has_template, filters, encoded.dropped, unusable):
        answered = asked(row) or row  # one object, however many trees are of it
        try:
            for tree in _trees(row, objective, codec):
                for ids in (tree.prompt, *(branch.ids for branch in tree.branches)):
                    check_known(codec.tokenizer, ids, vocabulary, row.origin)
                fitted, reason = fit(tree, max_length, overflow, codec.tokenizer.bos_token_id)
                if fitted is None:
                    encoded.dropped[reason] += 1
                    continue
                if fault := objective.fault(fitted):
                    raise UnusableRowError(row.origin, fault)
                encoded.truncated.update([reason] if reason else [])
                encoded.trees.append(fitted)
                encoded.keys.append(_key(row, tree))
                if keep_rows:
                    encoded.rows.append(answered)
        except UnusableRowError as error:
            if unusable == "refuse":
                raise
            encoded.dropped[error.reason] += 1
            encoded.named.setdefault(error.reason, []).extend(
                [row.origin] * (encoded.dropped[error.reason] <= NAMED)
            )
    for what, origins in codec.noted.items():
        encoded.noted[what] = len(origins)
        encoded.named.setdefault(what, list(origins)[:NAMED])
    if not len(encoded):
        reasons = _counted(encoded.dropped, encoded.named) or "it is empty"
        raise DataError(f"the data holds no usable row ({reasons})")
    return encoded


def _trees(row: Row, objective: Objective, codec: Codec) -> Sequence[Tree]:
    try:
        encoded = objective.encode(row, codec)
    except (TypeError, UnicodeError) as error:
        raise DataError(f"{row.origin}: the tokenizer refuses the text: {error}") from error
    return [encoded] if isinstance(encoded, Tree) else encoded


def _key(row: Row, tree: Tree) -> int:
    """Return a hash of what is compared: the prompt where a row has one, else all tokens."""
    prompt = row.fields.get("prompt")
    what = [branch.ids for branch in tree.branches] if prompt is None else prompt
    head = tree.prompt if prompt is None else None
    text = json.dumps([head, what], sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _counted(reasons: Counter[str], named: Mapping[str, Sequence[str]] = MappingProxyType({})) -> str:
    return ", ".join(
        f"{count:,} {reason}{_examples(named.get(reason, ()), count)}"
        for reason, count in sorted(reasons.items())
    )


def _examples(origins: Sequence[str], count: int) -> str:
    return f" ({', '.join(origins)}{' …' if count > len(origins) else ''})" if origins else ""
