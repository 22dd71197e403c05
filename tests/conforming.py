"""The methods that the conformance kit can only try with inputs of a test's own, such as a file."""

import csv
import json
from pathlib import Path

import datasets
import pytest

from luthier.testing import DataSourceSuite, OptimiserSuite, TrackerSuite
from luthier_plugins.data_sources.csv_file import Csv
from luthier_plugins.data_sources.folder import Folder
from luthier_plugins.data_sources.hub import Hub
from luthier_plugins.data_sources.json_file import Json
from luthier_plugins.data_sources.jsonl import JsonLines
from luthier_plugins.data_sources.mixture import Mixture
from luthier_plugins.data_sources.parquet import Parquet
from luthier_plugins.data_sources.reasoning_gym import ReasoningGym
from luthier_plugins.optimisers.galore import GaLore
from luthier_plugins.optimisers.paged_adamw import PagedAdamW
from luthier_plugins.optimisers.paged_adamw_8bit import PagedAdamW8bit
from luthier_plugins.trackers.wandb import WandB

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(3)]


class FileSuite(DataSourceSuite):
    """A source of the file that `write` leaves."""

    name = "rows"

    def write(self, path: Path) -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    @pytest.fixture(autouse=True)
    def _file(self, tmp_path: Path) -> None:
        self.path = tmp_path / self.name
        self.write(self.path)

    def make(self):
        return self.method(path=str(self.path))


class JsonLinesSuite(FileSuite):
    method = JsonLines


class JsonSuite(FileSuite):
    method = Json

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(ROWS))


class CsvSuite(FileSuite):
    method = Csv

    def write(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(ROWS[0]))
            table.writeheader()
            table.writerows(ROWS)


class ParquetSuite(FileSuite):
    method = Parquet

    def write(self, path: Path) -> None:
        datasets.Dataset.from_list(ROWS).to_parquet(path)


class FolderSuite(FileSuite):
    method = Folder

    def write(self, path: Path) -> None:
        path.mkdir()
        for name in ("a.jsonl", "b.jsonl"):
            super().write(path / name)


class HubSuite(FolderSuite):
    method = Hub


class MixtureSuite(FileSuite):
    method = Mixture

    def make(self):
        source = {"name": "jsonl", "path": str(self.path)}
        return Mixture(sources={"one": source, "two": {**source, "weight": 2.0, "limit": 2}})


class ReasoningGymSuite(DataSourceSuite):
    method = ReasoningGym
    options = {"task": "chain_sum", "size": 5}


class WandBSuite(TrackerSuite):
    method = WandB
    options = {"mode": "offline"}


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
class PagedAdamWSuite(OptimiserSuite):
    """Its arithmetic and its state; what is paged takes CUDA."""

    method = PagedAdamW


class PagedAdamW8bitSuite(PagedAdamWSuite):
    method = PagedAdamW8bit


class GaLoreSuite(OptimiserSuite):
    method = GaLore
    options = {"rank": 4, "refresh_every": 3}


SUITES = {
    suite.method: suite
    for suite in (
        JsonLinesSuite,
        JsonSuite,
        CsvSuite,
        ParquetSuite,
        FolderSuite,
        HubSuite,
        MixtureSuite,
        PagedAdamWSuite,
        PagedAdamW8bitSuite,
        ReasoningGymSuite,
        WandBSuite,
        GaLoreSuite,
    )
}
