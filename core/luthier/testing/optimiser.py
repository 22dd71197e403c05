"""The suite of optimisers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from luthier.contracts import InBackward, Optimiser, Skipping
from luthier.testing.suite import Suite, seeded

SHAPES = {
    "layers.0.weight": (24, 16),
    "layers.0.bias": (24,),
    "layers.1.weight": (16, 24),
    "norm.weight": (16,),
}
PLAIN = (int, float, bool, str, type(None))

Parameters = dict[str, nn.Parameter]


class OptimiserSuite(Suite):
    """What an `luthier.Optimiser` promises, on a quadratic of matrices and vectors.

    Attributes:
        steps: Steps in which it must come closer to the minimum.
        state_shape: The matrix whose state is measured; large enough that scalars and blocks do not count.
        state_factor: How far the planned state may be from the measured one.
    """

    method: ClassVar[type[Optimiser]]
    steps: ClassVar[int] = 30
    state_shape: ClassVar[tuple[int, int]] = (256, 128)
    state_factor: ClassVar[float] = 1.1

    def built(self, parameters: Parameters) -> torch.optim.Optimizer:
        """Return the optimiser over `parameters`, which it is given as an iterator."""
        made: torch.optim.Optimizer = self.make().build(iter(parameters.items()))
        return made

    def test_it_holds_every_parameter_once(self) -> None:
        """`build` reads its argument once (it may be an iterator) and puts each parameter in one group."""
        parameters = start()
        held = [id(p) for group in self.built(parameters).param_groups for p in group["params"]]
        wanted = sorted(id(p) for p in parameters.values())
        assert sorted(held) == wanted, "a parameter is missing or in two groups; build list(parameters) first"

    def test_it_comes_closer_to_the_minimum(self) -> None:
        """Steps along the gradient of a quadratic lower it."""
        parameters = start()
        optimiser, before = self.built(parameters), distance(parameters)
        for _ in range(self.steps):
            step(optimiser, parameters, noise=0.0)
        after = distance(parameters)
        assert after < before, f"the quadratic went from {before:.6f} to {after:.6f}; check the update's sign"

    def test_every_shape_moves(self) -> None:
        """Matrices and vectors move alike; what moves only matrices must hand vectors to another rule."""
        parameters, before = start(), start()
        optimiser = self.built(parameters)
        for number in range(3):
            step(optimiser, parameters, number)
        for name, parameter in parameters.items():
            assert not torch.equal(parameter, before[name]), f"{name} {tuple(parameter.shape)} does not move"

    def test_resumed_it_is_the_run_that_was_never_interrupted(self) -> None:
        """`state_dict` holds everything: restored into a fresh optimiser, further steps are bit-identical."""
        whole, first = start(), start()
        optimiser = self.built(whole)
        for number in range(8):
            step(optimiser, whole, number)
        interrupted = self.built(first)
        for number in range(4):
            step(interrupted, first, number)
        weights = {name: parameter.detach().clone() for name, parameter in first.items()}
        saved = as_read_back(interrupted.state_dict())
        second = {name: nn.Parameter(weight) for name, weight in weights.items()}
        resumed = self.built(second)
        resumed.load_state_dict(saved)
        for number in range(4, 8):
            step(resumed, second, number)
        for name in whole:
            same = torch.equal(whole[name], second[name])
            assert same, f"{name} differs after a resume; keep all state in optimiser.state or the groups"

    def test_its_state_is_safe_to_load(self) -> None:
        """`state_dict` is tensors, numbers, texts, lists and mappings: nothing that could run code."""
        parameters = start()
        optimiser = self.built(parameters)
        step(optimiser, parameters)
        strange = list(strangers(optimiser.state_dict(), "state_dict"))
        assert not strange, f"{', '.join(strange)}: keep tensors and plain values only"

    def test_the_schedule_decides_its_step(self) -> None:
        """Its groups have an `lr` that torch's schedules change; at 0 nothing moves, nor decays."""
        parameters, before = start(), start()
        optimiser = self.built(parameters)
        missing = [number for number, group in enumerate(optimiser.param_groups) if "lr" not in group]
        assert not missing, f"groups {missing} have no 'lr'"
        torch.optim.lr_scheduler.LambdaLR(optimiser, lambda _: 0.0)
        step(optimiser, parameters)
        for name, parameter in parameters.items():
            assert torch.equal(parameter, before[name]), f"{name} moves at lr = 0; multiply its update by lr"

    def test_what_has_no_gradient_stays(self) -> None:
        """A parameter whose gradient is None is left alone, weight decay included; the others move."""
        parameters, before = start(), start()
        optimiser = self.built(parameters)
        skipped = next(iter(parameters))
        for number in range(2):
            set_gradients(parameters, number)
            parameters[skipped].grad = None
            optimiser.step()
        assert torch.equal(parameters[skipped], before[skipped]), (
            f"{skipped} moves without a gradient; skip None"
        )
        rest = [name for name in parameters if name != skipped]
        assert any(not torch.equal(parameters[name], before[name]) for name in rest), "nothing else moves"
        optimiser.zero_grad(set_to_none=True)
        left = [name for name, parameter in parameters.items() if parameter.grad is not None]
        assert not left, f"zero_grad(set_to_none=True) leaves gradients on {left}"

    def test_it_skips_what_is_not_finite_if_it_says_so(self) -> None:
        """With `skips_non_finite`, such a gradient moves nothing, is counted, and later ones are as ever."""
        if not self.method.skips_non_finite:
            return
        parameters, before = start(), start()
        optimiser = self.built(parameters)
        assert isinstance(optimiser, Skipping), "skips_non_finite promises an optimiser with `skipped`"
        set_gradients(parameters)
        for parameter in parameters.values():
            assert parameter.grad is not None
            parameter.grad.view(-1)[0] = torch.nan
        optimiser.step()
        for name, parameter in parameters.items():
            assert torch.equal(parameter, before[name]), f"{name} moves along a gradient that is not finite"
        assert optimiser.skipped > 0, "what is skipped must be counted in `skipped`"
        step(optimiser, parameters)
        for name, parameter in parameters.items():
            moved = bool(parameter.isfinite().all()) and not torch.equal(parameter, before[name])
            assert moved, f"{name} is stuck after a gradient that was not finite"

    def test_it_steps_in_the_backward_pass_if_it_says_so(self) -> None:
        """`steps_in_backward` is true where `build` gives an `InBackward`; its last pass moves parameters."""
        parameters, before = start(), start()
        optimiser = self.built(parameters)
        inside = isinstance(optimiser, InBackward)
        said = self.make().steps_in_backward
        assert inside == said, f"steps_in_backward is {said}, but build's is {inside} about it"
        if not isinstance(optimiser, InBackward):
            return
        for last in (False, True):
            optimiser.announce(last=last, weight=2.0)
            loss = sum((0.5 * (p - target(name)).square().sum() for name, p in parameters.items()), start=0.0)
            loss.backward()  # type: ignore[union-attr]
            for name, parameter in parameters.items():
                moved = not torch.equal(parameter, before[name])
                assert moved == last, f"{name} must move with the last pack's gradient, and only then"
        left = [name for name, parameter in parameters.items() if parameter.grad is not None]
        assert not left, f"{', '.join(left)}: gradients are not freed"

    def test_equal_runs_are_bit_identical(self) -> None:
        """The same gradients give the same weights, bit for bit."""
        runs = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            parameters = start()
            optimiser = self.built(parameters)
            for number in range(4):
                step(optimiser, parameters, number)
            runs.append(parameters)
        for name in runs[0]:
            same = torch.equal(runs[0][name], runs[1][name])
            assert same, f"{name} differs between two equal runs; seed a generator of your own"

    def test_the_state_it_plans_for_is_the_state_it_has(self) -> None:
        """`state_bytes` is about what the state of a matrix takes."""
        weight = nn.Parameter(torch.randn(self.state_shape, generator=seeded()))
        optimiser = self.built({"layers.0.weight": weight})
        for number in range(2):
            weight.grad = torch.randn(self.state_shape, generator=seeded(number))
            optimiser.step()
        tensors = [
            value for value in walk(optimiser.state_dict()["state"]) if isinstance(value, torch.Tensor)
        ]
        measured = sum(value.numel() * value.element_size() for value in tensors) / weight.numel()
        planned = self.make().state_bytes("layers.0.weight", self.state_shape) / weight.numel()
        # A tenth of a byte of slack: step counters, and code books of quantised states.
        fits = measured <= planned * self.state_factor + 0.1 and planned <= measured * self.state_factor + 0.1
        assert fits, (
            f"state_bytes says {planned:.2f} a parameter, a {self.state_shape} matrix has {measured:.2f}"
        )


def start() -> Parameters:
    """Return the parameters of the quadratic, always the same."""
    return {
        name: nn.Parameter(torch.randn(shape, generator=seeded(number)))
        for number, (name, shape) in enumerate(SHAPES.items())
    }


def target(name: str) -> torch.Tensor:
    """Return the minimum of the parameter `name`; far from 0, where weight decay pulls."""
    return 5.0 * torch.randn(SHAPES[name], generator=seeded(100 + list(SHAPES).index(name)))


def distance(parameters: Parameters) -> float:
    """Return half the squared distance to the minimum, in fp64."""
    return sum(
        0.5 * float((p.detach().double() - target(name).double()).square().sum())
        for name, p in parameters.items()
    )


def set_gradients(parameters: Parameters, number: int = 0, noise: float = 0.1) -> None:
    """Give every parameter the gradient of the quadratic, with the noise of step `number`."""
    for name, parameter in parameters.items():
        drawn = torch.randn(parameter.shape, generator=seeded(1000 + number))
        parameter.grad = parameter.detach() - target(name) + noise * drawn


def step(
    optimiser: torch.optim.Optimizer, parameters: Parameters, number: int = 0, noise: float = 0.1
) -> None:
    """Take one optimiser step."""
    set_gradients(parameters, number, noise)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def as_read_back(state: Any) -> Any:
    """Return `state` as a checkpoint of safetensors and JSON brings it back: copies, tuples as lists."""
    if isinstance(state, Mapping):
        return {key: as_read_back(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [as_read_back(value) for value in state]
    return copy.deepcopy(state)


def walk(state: Any) -> Iterator[Any]:
    """Yield everything in `state` that is not a container."""
    if isinstance(state, Mapping | list | tuple):
        for value in state.values() if isinstance(state, Mapping) else state:
            yield from walk(value)
    else:
        yield state


def strangers(state: Any, where: str) -> Iterator[str]:
    """Yield where in `state` something stands that safetensors and JSON cannot hold."""
    if isinstance(state, Mapping):
        for key, value in state.items():
            yield from strangers(value, f"{where}[{key!r}]")
    elif isinstance(state, list | tuple):
        for number, value in enumerate(state):
            yield from strangers(value, f"{where}[{number}]")
    elif not isinstance(state, (*PLAIN, torch.Tensor)):
        yield f"{where} is a {type(state).__name__}"
