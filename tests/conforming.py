"""The methods that the conformance kit can only try with inputs of a test's own, such as a file."""

import json
from pathlib import Path

import pytest

from luthier.testing import DataSourceSuite
from luthier_plugins.data_sources.jsonl import JsonLines
from luthier_plugins.data_sources.reasoning_gym import ReasoningGym


class JsonLinesSuite(DataSourceSuite):
    method = JsonLines

    @pytest.fixture(autouse=True)
    def _file(self, tmp_path: Path) -> None:
        self.path = tmp_path / "rows.jsonl"
        rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(3)]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(self):
        return JsonLines(path=str(self.path))


class ReasoningGymSuite(DataSourceSuite):
    method = ReasoningGym
    options = {"task": "chain_sum", "size": 5}


SUITES = {suite.method: suite for suite in (JsonLinesSuite, ReasoningGymSuite)}
