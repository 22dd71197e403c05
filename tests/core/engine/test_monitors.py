"""What is watched while training: averages over processes, parameters that do not move."""

import logging

import pytest
import torch
from torch import nn

from luthier import Loss
from luthier.engine.monitors import PATIENCE, Monitor, Unmoved


def test_a_meter_taken_up_again_averages_as_if_it_had_never_stopped():
    whole, first = Monitor(), Monitor()
    losses = [Loss(torch.tensor(float(n)), n, {"m": (torch.tensor(2.0), 1)}) for n in (1, 2, 5)]
    for loss in losses:
        whole.add(loss)
    for loss in losses[:2]:
        first.add(loss)
    second = Monitor.of(first.state())
    second.add(losses[2])
    assert second.drain() == whole.drain() == {"loss": 1.0, "m": 2.0}
    assert whole.drain() == {}


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).bfloat16()
    model[1].bias.requires_grad_(False)
    return model


def test_a_parameter_too_coarse_for_its_steps_is_named(model, caplog):
    # users.md row 15: a magnitude in bf16 that steps of 1e-4 never move.
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    watch = Unmoved(model, 0, 100)
    for _ in range(PATIENCE):
        with torch.no_grad():
            model[0].weight.add_(1e-4)
            model[0].bias.add_(1.0)
            model[1].weight.add_(1.0)
    with caplog.at_level(logging.WARNING, "luthier"):
        watch.look(PATIENCE)
    assert "1 of 3 trained parameters have not moved after 10 steps: 0.weight." in caplog.text


def test_moving_parameters_and_resumed_runs_are_silent(model, caplog):
    moving, resumed = Unmoved(model, 0, 100), Unmoved(model, 5, 100)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    with caplog.at_level(logging.WARNING, "luthier"):
        moving.look(PATIENCE - 1)
        moving.look(PATIENCE)
        resumed.look(PATIENCE)
    assert not caplog.text
