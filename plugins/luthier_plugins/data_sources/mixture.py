"""Weighted mixtures: rows drawn from several sources."""

import functools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from luthier import (
    ConfigError,
    DataError,
    DataSource,
    LuthierError,
    Register,
    Row,
    build_method,
    hookimpl,
    option,
)


@dataclass(frozen=True)
class Mixture(DataSource):
    """Rows of several sources, each drawn with a probability in proportion to its weight.

    `sources` maps names of your choice to sources: ``{chat: {name: jsonl, path: a.jsonl, weight: 3}, …}``.
    Rows of one source keep their order; which source is next depends on `seed` alone.
    """

    source: ClassVar[str] = "Raffel et al. 2020, arXiv 1910.10683, section 3.5.2"

    sources: Mapping[str, Any] = option({}, "Name → source: {name: METHOD, weight: 1.0, its options}.")
    until: Literal["first", "repeat", "all"] = option(
        "first",
        "first: end with the source that ends first, so that shares are the weights; repeat: begin ended "
        "sources again until each was read once; all: every row once, shares shift towards the end.",
    )
    limit: int | None = option(None, "Draw so many rows at most.")
    seed: int = option(0, "Seed of the draws.")

    def __post_init__(self) -> None:
        """Build the sources, so that a mistake in one is told before anything loads."""
        if not self.sources:
            raise ConfigError("sources is empty; give {chat: {name: jsonl, path: a.jsonl, weight: 3}, …}")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit={self.limit} must be at least 1; null draws until a source ends")
        assert self._children

    def rows(self) -> Iterator[Row]:
        """Yield the drawn rows, each with its own source's origin.

        Raises:
            LuthierError: What the sources raise, or one of them has no rows.
        """
        chance = random.Random(self.seed)
        alive = {name: child.rows() for name, (child, _) in self._children.items()}
        drawn = dict.fromkeys(alive, 0)
        unread = set(alive)
        while self.limit is None or sum(drawn.values()) < self.limit:
            names = list(alive)
            name = chance.choices(names, [self._children[key][1] for key in names])[0]
            child = self._children[name][0]
            row = next(alive[name], None)
            if row is None and not drawn[name]:
                raise DataError(f"sources.{name} has no rows")
            if row is None:
                unread.discard(name)
                if self.until == "first" or not unread:
                    return
                if self.until == "repeat":
                    alive[name] = child.rows()
                else:
                    del alive[name]
                continue
            drawn[name] += 1
            yield replace(row, source=row.source or child)

    def verify(self, row: Row, answer: str) -> float | None:
        """Let the row's own source decide."""
        return None if row.source is None else row.source.verify(row, answer)

    @functools.cached_property
    def _children(self) -> dict[str, tuple[DataSource, float]]:
        # What is said of the columns of all sources holds for those that do not say it themselves.
        shared = {"columns": dict(self.columns)} if self.columns else {}
        children = {}
        for name, values in self.sources.items():
            try:
                if not isinstance(values, Mapping):
                    raise ConfigError(f"expected {{name: METHOD, weight: 1.0, …}}, got {values!r}")
                options = {"format": self.format, **shared, **values}
                weight = options.pop("weight", 1.0)
                if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e9:
                    raise ConfigError(f"weight={weight} must be a positive number")
                children[str(name)] = (build_method("data_source", options), float(weight))
            except LuthierError as error:
                raise type(error)(f"sources.{name}: {error}") from error
        return children


@hookimpl
def register_data_sources(register: Register) -> None:
    """Register `mixture`."""
    register("mixture", Mixture)
