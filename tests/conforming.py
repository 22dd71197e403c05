"""The methods that the conformance kit can only try with inputs of a test's own, such as a file."""

import csv
import json
from importlib.metadata import EntryPoint
from pathlib import Path

import datasets
import pytest
import torch

from luthier.models.score_head import attach_head
from luthier.testing import (
    DataSourceSuite,
    ObjectiveSuite,
    OptimiserSuite,
    RewardModelSuite,
    TrackerSuite,
    tiny_llama,
    tiny_tokenizer,
)
from luthier_plugins.data_sources.csv_file import Csv
from luthier_plugins.data_sources.folder import Folder
from luthier_plugins.data_sources.hub import Hub
from luthier_plugins.data_sources.json_file import Json
from luthier_plugins.data_sources.jsonl import JsonLines
from luthier_plugins.data_sources.mixture import Mixture
from luthier_plugins.data_sources.parquet import Parquet
from luthier_plugins.data_sources.reasoning_gym import ReasoningGym
from luthier_plugins.objectives.reward.reward import Reward
from luthier_plugins.optimisers.galore.galore import GaLore
from luthier_plugins.optimisers.paged_adamw import PagedAdamW
from luthier_plugins.optimisers.paged_adamw_8bit import PagedAdamW8bit
from luthier_plugins.reward_models.function import Function
from luthier_plugins.reward_models.outcome import Outcome
from luthier_plugins.reward_models.process import Process
from luthier_plugins.reward_models.verifier import Verifier
from luthier_plugins.trackers.wandb.wandb import WandB
from luthier_toolkits.saving import save_model

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


class OutcomeSuite(RewardModelSuite):
    """A model that was saved with its head."""

    method = Outcome
    kind = "sequence"

    @pytest.fixture(autouse=True)
    def _model(self, tmp_path: Path) -> None:
        tokenizer = tiny_tokenizer()
        model = tiny_llama(vocab_size=len(tokenizer))
        attach_head(model, self.kind, torch.Generator().manual_seed(1))
        save_model(model, tokenizer, tmp_path / "model")
        self.path = tmp_path / "model"

    def make(self):
        return self.method(model=str(self.path))


class ProcessSuite(OutcomeSuite):
    method = Process
    kind = "token"


class RewardSuite(ObjectiveSuite):
    """Its scores are those of last tokens, whatever they are."""

    method = Reward
    scores_tokens = False


class VerifierSuite(RewardModelSuite):
    """By a pattern; its other ways need rows, which the suite has none of."""

    method = Verifier
    options = {"match": "pattern", "pattern": r"\d"}


def words(prompts, completions, rows):
    """A reward function: how many words a completion has."""
    return [len(completion.split()) for completion in completions]


class FunctionSuite(RewardModelSuite):
    method = Function
    options = {"function": "words"}

    @pytest.fixture(autouse=True)
    def _registered(self, monkeypatch) -> None:
        entry = EntryPoint("words", "conforming:words", "luthier.rewards")
        monkeypatch.setattr("luthier_plugins.reward_models.function.entry_points", lambda group: [entry])


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
        RewardSuite,
        OutcomeSuite,
        ProcessSuite,
        VerifierSuite,
        FunctionSuite,
    )
}
