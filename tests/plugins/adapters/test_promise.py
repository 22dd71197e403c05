"""The promise of `luthier.testing.AdapterSuite`, in the corners where adapters were read differently."""

import pytest
import torch

from luthier.testing import AdapterSuite
from luthier_plugins.adapters.dora.dora import DoRA
from luthier_plugins.adapters.lora import LoRA

PROMISE = "test_what_was_saved_is_what_was_trained_for_everyone"
OVERLAPPING = {
    "rank_pattern": {r"0\.self_attn\.v_proj": 2, ".*_proj": 6},
    "alpha_pattern": {r"layers\.0\..*": 2.0, "v_proj": 64.0, ".*": 8.0},
}
CORNERS = {
    "overlapping": {"rank": 4, **OVERLAPPING},
    "overlapping, rank-stabilised": {"rank": 4, "rank_stabilised": True, **OVERLAPPING},
    "the head": {"rank": 4, "targets": ["q_proj", "lm_head"]},
    "Conv1D beside Linear": {"rank": 4, "targets": ["c_proj", "lm_head"]},
}
LORA_ALONE = {
    "above the short side": {"rank": 12, "init": "pissa"},
    "pissa": {"rank": 4, "init": "pissa", **OVERLAPPING},
    "an embedding": {"rank": 4, "targets": ["q_proj", "embed_tokens"]},
    "GPT-2's embeddings": {"rank": 4, "targets": ["c_attn", "wte", "wpe"]},
    "experts": {
        "rank": 4, "dropout": 0.0, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"gate_up_proj": 3.0},
    },
    "experts alone": {
        "rank": 2, "dropout": 0.0, "targets": [], "target_parameters": ["experts.down_proj"],
    },
    "a router": {"rank": 2, "dropout": 0.0, "target_parameters": ["mlp.gate.weight"]},
}  # fmt: skip
CASES = {
    **{f"LoRA, {name}": (LoRA, options) for name, options in (CORNERS | LORA_ALONE).items()},
    **{f"DoRA, {name}": (DoRA, options) for name, options in CORNERS.items()},
}


def pytest_generate_tests(metafunc):
    if "base" in metafunc.fixturenames and "case" in metafunc.fixturenames:
        from luthier.testing.adapter_promise import PROMISED

        metafunc.parametrize("base", sorted(PROMISED))


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES)
def test_what_was_saved_is_what_was_trained(case, base, tmp_path, caplog):
    """A1, A2, A5, B2: one row of the table of cases a model."""
    method, options = CASES[case]
    suite = type("Corner", (AdapterSuite,), {"method": method, "options": options})()
    getattr(suite, PROMISE)(base, tmp_path, caplog)
