"""The rows of a run as its config says: encoded, filtered, and the held-out ones kept apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from omegaconf import DictConfig

from luthier import config as configs
from luthier.contracts import DataSource, Objective
from luthier.data.data import Encoded, encode
from luthier.errors import ConfigError
from luthier.text import Codec


class Reader(Protocol):
    """What reads: a loaded model, or its tokenizer alone."""

    @property
    def tokenizer(self) -> Any:
        """A transformers tokenizer."""

    @property
    def context(self) -> int | None:
        """The longest sequence the model takes in tokens."""

    @property
    def vocabulary(self) -> int | None:
        """Tokens that the model's embedding has a row for."""


def source_rows(
    config: DictConfig, key: str, reader: Reader, objective: Objective, keep_rows: bool = True
) -> tuple[DataSource, Encoded]:
    """Return the source that `config` has under `key`, and its encoded rows.

    Raises:
        ConfigError: `max_length` is more than the model can take.
        DataError: A row is malformed, or none is left.
    """
    context = reader.context
    if config.max_length and context and config.max_length > context:
        raise ConfigError(f"max_length={config.max_length} is more than the model's context, {context}")
    source: DataSource = configs.build("data_source", config[key])
    # Built anew for every source: a filter may remember what it saw.
    filters = [configs.build("row_filter", node) for node in (config.get("row_filters") or {}).values()]
    length, codec = int(config.max_length or context or 2**20), Codec(reader.tokenizer)
    overflow, unusable = str(config.overflow), str(config.unusable)
    return source, encode(
        source, objective, codec, length, overflow, filters, keep_rows, unusable, reader.vocabulary
    )


@dataclass(frozen=True)
class RunRows:
    """The rows of a run.

    Attributes:
        source: Where those to train on come from.
        data: Those.
        held_out: The held-out ones with their source, which are left out of the former; None: there are none.
    """

    source: DataSource
    data: Encoded
    held_out: tuple[DataSource, Encoded] | None


def training_rows(config: DictConfig, reader: Reader, objective: Objective) -> RunRows:
    """Return the rows to train on, and the held-out ones.

    Raises:
        ConfigError: Nothing is left to train on, or `max_length` is more than the model can take.
        DataError: A row is malformed.
    """
    # Of rows that only train the trees are enough; answers to them must be verified.
    source, data = source_rows(config, "data", reader, objective, keep_rows=objective.keeps_rows)
    if not config.eval_data:
        return RunRows(source, data.completed(objective, config.seed, config.unusable, training=True), None)
    held_source, held_out = source_rows(config, "eval_data", reader, objective)
    data = data.without(held_out, str(config.unusable))
    if not len(data):
        raise ConfigError("every row of data is also in eval_data: nothing is left to train on")
    data = data.completed(objective, config.seed, config.unusable, training=True)
    return RunRows(source, data, (held_source, held_out.completed(objective, config.seed)))
