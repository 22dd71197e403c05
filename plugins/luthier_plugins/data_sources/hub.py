"""Data sets of the Hugging Face hub, through the library datasets."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from luthier import ConfigError, DataError, DataSource, Register, Row, hookimpl, option
from luthier_toolkits.files import without_nulls


@dataclass(frozen=True)
class Hub(DataSource):
    """Rows of a data set at the hub, or of a folder laid out like one; code that comes with it never runs."""

    source: ClassVar[str] = "https://github.com/huggingface/datasets"

    path: str = option("???", "Name at the hub, e.g. org/name, or a folder.")
    config: str | None = option(None, "Configuration of the data set; null: its default.")
    split: str = option("train", "Split, also a slice of one: train[:1%].")
    revision: str | None = option(None, "Branch, tag or commit at the hub.")
    streaming: bool = option(False, "Read over the network as rows are asked for; nothing is kept on disk.")
    limit: int | None = option(None, "Read so many rows at most.")

    def __post_init__(self) -> None:
        """Refuse a limit that reads nothing."""
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit={self.limit} must be at least 1; null reads all rows")

    def rows(self) -> Iterator[Row]:
        """Yield the rows, each with ``name/split[index]`` as its origin.

        Raises:
            ConfigError: datasets is not installed, or the hub gives no such data set or split.
            DataError: A row cannot be read.
        """
        rows = itertools.islice(iter(self._load()), self.limit)
        for index in itertools.count():
            origin = f"{self.path}/{self.split}[{index}]"
            try:
                fields = next(rows, None)
            # The files of a data set are read by as many libraries as there are formats.
            except Exception as error:
                raise DataError(f"{origin}: cannot be read: {_line(error)}") from error
            if fields is None:
                break
            yield Row({name: without_nulls(cell) for name, cell in fields.items()}, origin)
        if not index:
            raise DataError(f"{self.path}: the split '{self.split}' has no rows")

    def _load(self) -> Any:
        try:
            import datasets
            import huggingface_hub
        except ImportError as error:
            raise ConfigError("needs the package datasets: pip install 'luthier[data]'") from error
        try:
            # Asked first and once: datasets asks an unreachable hub for half a minute.
            if not Path(self.path).is_dir() and not huggingface_hub.constants.HF_HUB_OFFLINE:
                huggingface_hub.HfApi().dataset_info(self.path, revision=self.revision, timeout=10)
            return datasets.load_dataset(
                self.path, self.config, split=self.split, revision=self.revision, streaming=self.streaming
            )
        # datasets lets through whatever its readers, the hub and the network raise.
        except Exception as error:
            raise ConfigError(
                f"path={self.path}: the hub gives no such data set now: {_line(error)}. Check the spelling, "
                "config, split, the connection and `hf auth login`; HF_HUB_OFFLINE=1 reads what is cached"
            ) from error


def _line(error: BaseException) -> str:
    # datasets says that something happened, and what did is its cause.
    error = error.__cause__ or error
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"


@hookimpl
def register_data_sources(register: Register) -> None:
    """Register `hub`."""
    register("hub", Hub)
