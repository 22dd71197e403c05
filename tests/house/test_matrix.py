"""Every quantiser × adapter × optimiser: it trains, or one line says what to choose instead."""

import itertools
import json

import pytest

from helpers import tiny_llama, tiny_tokenizer, write_rows
from luthier import ConfigError, compose, train
from luthier.registry.method_catalogue import catalogue

pytestmark = pytest.mark.slow

TRAINS_ALL = {"full"}
NEEDS_CUDA = {"paged_adamw": "choose optimiser=adamw", "paged_adamw_8bit": "choose optimiser=adamw_8bit"}
PROJECTS_GRADIENTS = {"galore"}
SMALL = {
    "lora": ["adapter.rank=4"],
    "dora": ["adapter.rank=4"],
    "vera": ["adapter.rank=8"],
    "galore": ["optimiser.rank=8"],
}
"""Options that fit a toy model."""


def refused(quantiser, adapter, optimiser):
    """What the user must be told, as methods.md and the issue have it; None: it must train."""
    if adapter in TRAINS_ALL and quantiser is not None:
        return rf"adapter={adapter} cannot be combined with quantiser={quantiser}: adapter=lora"
    if optimiser in PROJECTS_GRADIENTS and adapter not in TRAINS_ALL:
        return rf"optimiser={optimiser} cannot be combined with adapter={adapter}: .*adapter=full"
    if optimiser in NEEDS_CUDA:
        return rf"optimiser={optimiser} needs cuda, and this run is on cpu: .*{NEEDS_CUDA[optimiser]}"
    return None


ALL = list(
    itertools.product(
        [None, *catalogue().names("quantiser")], catalogue().names("adapter"), catalogue().names("optimiser")
    )
)
REFUSED = [(combination, told) for combination in ALL if (told := refused(*combination))]
ALLOWED = [combination for combination in ALL if refused(*combination) is None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128)
    model.save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")
    rows = [{"prompt": f"{number} + 1 =", "completion": f" {number + 1}"} for number in range(8)]
    write_rows(path / "rows.jsonl", rows)
    return path


def composed(folder, run_dir, quantiser, adapter, optimiser, *more):
    return compose("train", [
        f"model.path={folder}/base", "model.dtype=float32", "model.device=cpu", "data=jsonl",
        f"data.path={folder}/rows.jsonl", f"adapter={adapter}", f"optimiser={optimiser}",
        f"quantiser={quantiser or 'none'}", *SMALL.get(adapter, []), *SMALL.get(optimiser, []),
        "batch_size=8", "max_steps=2", "log_every=1", "schedule.name=constant", "schedule.warmup=0",
        "optimiser.lr=3e-3", f"run_dir={run_dir}", "tracker=[metrics]", *more,
    ])  # fmt: skip


@pytest.mark.parametrize(("combination", "told"), REFUSED, ids=str)
def test_what_does_not_go_together_is_refused_with_a_way_out(folder, tmp_path, combination, told):
    with pytest.raises(ConfigError, match=told) as error:
        composed(folder, tmp_path / "run", *combination)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("combination", ALLOWED, ids=str)
def test_what_goes_together_learns(folder, tmp_path, combination):
    """Both steps see all rows, so the second loss is what the first step made of it."""
    result = train(composed(folder, tmp_path / "run", *combination))
    first, second = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert second["loss"] < first["loss"]
    assert 0 < result.trainable_parameters <= result.total_parameters
    assert any((tmp_path / "run/model").glob("*.safetensors"))


def test_layerwise_steps_go_with_no_clipping(folder, tmp_path):
    layerwise = (None, "full", "galore", "optimiser.layerwise=true")
    with pytest.raises(ConfigError, match=r"max_grad_norm=null"):
        composed(folder, tmp_path / "run", *layerwise)
    train(composed(folder, tmp_path / "run", *layerwise, "max_grad_norm=null"))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert losses[1] < losses[0]
