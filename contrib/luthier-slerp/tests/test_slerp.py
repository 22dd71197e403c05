"""SLERP: right angles by hand, its ends, its refusals, and Luthier's suite of mergers."""

import math

import pytest
import torch

from luthier import ConfigError, Group
from luthier.testing import MergerSuite
from luthier_slerp.slerp import Slerp


class TestSlerp(MergerSuite):
    method = Slerp


def between(one, two, t):
    group = Group("w", ("a", "b"), (torch.tensor(one), torch.tensor(two)))
    return Slerp(t=t).merge(group)


def test_at_a_right_angle_the_path_is_a_circle():
    third = between([1.0, 0.0], [0.0, 1.0], 1 / 3)
    torch.testing.assert_close(third, torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]))


def test_its_ends_are_the_models():
    one, two = [1.0, 2.0, 0.5], [0.3, -1.0, 4.0]
    torch.testing.assert_close(between(one, two, 0.0), torch.tensor(one))
    torch.testing.assert_close(between(one, two, 1.0), torch.tensor(two))


def test_parallel_tensors_go_straight():
    torch.testing.assert_close(between([1.0, 2.0], [3.0, 6.0], 0.25), torch.tensor([1.5, 3.0]))
    torch.testing.assert_close(between([0.0, 0.0], [2.0, 2.0], 0.5), torch.tensor([1.0, 1.0]))


def test_a_step_outside_the_path_is_refused():
    with pytest.raises(ConfigError, match=r"t=1\.5 must be in"):
        Slerp(t=1.5)
