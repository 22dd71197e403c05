"""States of generators belong to the run's device; torch.cuda is stood in for."""

import torch

from luthier.runs.state import _random, _set_random


def test_the_state_of_the_device_of_the_run_is_kept_whichever_is_the_current_one(monkeypatch):
    device = torch.device("cuda:1")
    there = {device: torch.tensor([1, 2, 3], dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", there.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, on: there.__setitem__(on, state))
    state = _random(device)
    there[device] = torch.zeros(3, dtype=torch.uint8)
    _set_random(state, device)
    assert there[device].tolist() == [1, 2, 3]
    assert "cuda" not in _random(torch.device("cpu"))
    _set_random(state, torch.device("cpu"))  # resumed elsewhere: what that device lacks is left out
