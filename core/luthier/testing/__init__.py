"""The conformance kit: one suite a kind of method, for pytest.

A plugin's tests subclass the suite of its kind and name the method; every ``test_*`` is then part of them::

    from luthier.testing import OptimiserSuite

    class TestToy(OptimiserSuite):
        method = Toy
        options = {"lr": 1e-3}  # where the defaults are not what should be tested

A check's docstring is the contract, and its failure says what to mend. Everything runs on a CPU, on random
models of two layers. Only tests import this package.
"""

from luthier.testing.adapter import AdapterSuite
from luthier.testing.command import CommandSuite
from luthier.testing.data_source import DataSourceSuite
from luthier.testing.merger import MergerSuite
from luthier.testing.models import FakeQuantised, quantised, tiny_gpt2, tiny_llama, tiny_moe, tiny_tokenizer
from luthier.testing.objective import ObjectiveSuite
from luthier.testing.optimiser import OptimiserSuite
from luthier.testing.quantiser import QuantiserSuite
from luthier.testing.reward_model import RewardModelSuite
from luthier.testing.row_filter import RowFilterSuite
from luthier.testing.selector import SelectorSuite
from luthier.testing.suite import Suite
from luthier.testing.tracker import TrackerSuite

SUITES: dict[str, type[Suite]] = {
    "adapter": AdapterSuite,
    "quantiser": QuantiserSuite,
    "optimiser": OptimiserSuite,
    "objective": ObjectiveSuite,
    "reward_model": RewardModelSuite,
    "selector": SelectorSuite,
    "merger": MergerSuite,
    "data_source": DataSourceSuite,
    "row_filter": RowFilterSuite,
    "tracker": TrackerSuite,
    "command": CommandSuite,
}
"""The suite of every kind, by the kind's name."""

__all__ = [
    "SUITES", "AdapterSuite", "CommandSuite", "DataSourceSuite", "FakeQuantised", "MergerSuite",
    "ObjectiveSuite", "OptimiserSuite", "QuantiserSuite", "RewardModelSuite", "RowFilterSuite",
    "SelectorSuite", "Suite", "TrackerSuite", "quantised", "tiny_gpt2", "tiny_llama", "tiny_moe",
    "tiny_tokenizer",
]  # fmt: skip
