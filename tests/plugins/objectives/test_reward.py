"""The reward objective: its equation, margins, what it says of calibration and length."""

import math

import pytest
import torch

from helpers import tiny_llama, tiny_tokenizer
from luthier import Codec, DataError, ModelPolicy, Pack, Row
from luthier.contracts.objective import Loss
from luthier.engine.monitors import Monitor
from luthier.models.score_head import attach_head
from luthier_plugins.objectives.reward.calibration import calibration_metrics, correlation_metrics, summarised
from luthier_plugins.objectives.reward.reward import Reward

ROWS = [
    {"prompt": "What is 12 + 7?", "chosen": " The answer is 19.", "rejected": " No idea", "margin": 0.7},
    {"prompt": "one two", "chosen": " three", "rejected": " four five six seven"},
]


@pytest.fixture
def policy():
    model = tiny_llama()
    attach_head(model, "sequence", torch.Generator().manual_seed(0))
    return ModelPolicy(model)


def trees(objective, rows=ROWS):
    codec = Codec(tiny_tokenizer())
    return [objective.encode(Row(row, f"row {n}"), codec) for n, row in enumerate(rows, 1)]


def test_the_loss_is_the_equation(policy):
    objective = Reward(centre=0.3)
    pack = Pack.of(trees(objective))
    loss = objective.loss(policy, pack)
    scores = policy.scores(pack, pack.ends).detach().tolist()
    expected = 0.0
    for (chosen, rejected), margin in zip((scores[:2], scores[2:]), (0.7, 0.0), strict=True):
        expected += math.log1p(math.exp(-(chosen - rejected - margin))) + 0.3 * (chosen + rejected) ** 2
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    assert loss.weight == 2
    right = sum(a > b for a, b in (scores[:2], scores[2:]))
    assert float(loss.metrics["pair_accuracy"][0]) == right


@pytest.mark.parametrize("margin", ["much", True, math.nan])
def test_a_margin_that_is_no_number_is_refused(margin):
    with pytest.raises(DataError, match="row 1: margin must be a number"):
        trees(Reward(), [{**ROWS[0], "margin": margin}])


def drained(metrics):
    meter = Monitor()
    meter.add(Loss(torch.tensor(0.0), 1.0, metrics))
    return summarised(meter.drain())


def test_calibration_counts_bins():
    # σ(0.2) = 0.55 twice, once right; σ(2) = 0.88 twice, both right.
    told = drained(calibration_metrics(torch.tensor([0.2, -0.2, 2.0, 2.0])))
    assert told["calibration/50–60 %"] == 0.5
    assert told["calibration/80–90 %"] == 1.0
    assert "calibration/60–70 %" not in told
    expected = 0.5 * abs(0.5 - torch.sigmoid(torch.tensor(0.2))) + 0.5 * (
        1 - torch.sigmoid(torch.tensor(2.0))
    )
    assert told["calibration_error"] == pytest.approx(float(expected), rel=1e-5)
    assert not any(name.startswith("raw/") for name in told)


def test_the_correlation_is_pearsons():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, generator=generator)
    y = 0.5 * x + torch.randn(50, generator=generator)
    told = drained(correlation_metrics("length_correlation", x, y))
    assert told["length_correlation"] == pytest.approx(
        float(torch.corrcoef(torch.stack([x, y]))[0, 1]), rel=1e-4
    )
    assert drained(correlation_metrics("one", x, torch.ones(50)))["one"] == 0.0
