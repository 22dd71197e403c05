"""The suite of mergers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
import torch

from luthier.merger import Merger
from luthier.testing.suite import Suite, apart, seeded

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (20, 8),
    "model.layers.0.mlp.up_proj.weight": (12, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 12),
    "model.norm.weight": (8,),
    "model.conv.weight": (2, 3, 4),
}
CLOSE = 1e-6


class MergerSuite(Suite):
    """What a `luthier.Merger` promises, tensor by tensor.

    Attributes:
        inputs: How many models are merged; the least it takes, or three.
    """

    method: ClassVar[type[Merger]]
    inputs: ClassVar[int] = 3

    def merged(self, name: str, order: tuple[int, ...] | None = None) -> torch.Tensor:
        """Return the merge of the tensor `name` of the models `order`, all by default."""
        models = order or tuple(range(max(self.inputs, self.method.least_inputs)))
        found: torch.Tensor = self.make().merge(name, [tensor(name, one) for one in models], self.base(name))
        return found

    def base(self, name: str) -> torch.Tensor | None:
        """Return the base model's tensor, if the method needs one."""
        return tensor(name, 99) if self.method.needs_base else None

    def test_it_returns_float32_of_the_inputs_shape(self) -> None:
        """The result is float32 of the inputs' shape, finite, and a tensor of its own."""
        for name, shape in SHAPES.items():
            found = self.merged(name)
            assert found.shape == shape, f"{name}: {shape} became {tuple(found.shape)}"
            assert found.dtype == torch.float32, f"{name} is {found.dtype}, not float32"
            assert torch.isfinite(found).all(), f"{name} is not finite"

    def test_its_inputs_stay_as_they_are(self) -> None:
        """Inputs and base are shared with other calls and never written to."""
        for name in SHAPES:
            count = max(self.inputs, self.method.least_inputs)
            inputs, base = [tensor(name, one) for one in range(count)], self.base(name)
            before = [one.clone() for one in inputs]
            self.make().merge(name, inputs, base)
            same = all(map(torch.equal, inputs, before))
            assert same, f"{name}: merge wrote into its inputs; work on a copy"
            assert base is None or torch.equal(base, tensor(name, 99)), f"{name}: merge wrote into the base"

    def test_one_model_is_itself(self) -> None:
        """Where one input is enough (`least_inputs` 1), merging it changes nothing."""
        if self.method.least_inputs > 1:
            pytest.skip("it needs several models")
        for name in SHAPES:
            off = apart(self.merged(name, (0,)), tensor(name, 0))
            assert off < CLOSE, f"{name}: one model alone is {off:.1e} from itself; or set least_inputs = 2"

    def test_the_order_of_the_models_is_without_effect(self) -> None:
        """A method whose order matters says so: ``symmetric: ClassVar[bool] = False``."""
        if not self.method.symmetric:
            pytest.skip("its order matters, and it says so")
        order = tuple(range(max(self.inputs, self.method.least_inputs)))
        for name in SHAPES:
            off = apart(self.merged(name, order[::-1]), self.merged(name, order))
            assert off < CLOSE, (
                f"{name}: in another order the result is {off:.1e} apart; set symmetric = False"
            )

    def test_shards_are_without_effect(self) -> None:
        """Tensors merged in any order and from several threads are bit-identical: seeds come from names."""
        expected = {name: self.merged(name) for name in SHAPES}
        torch.manual_seed(1234)
        with ThreadPoolExecutor(4) as pool:
            backwards = list(SHAPES)[::-1]
            found = dict(zip(backwards, pool.map(self.merged, backwards), strict=True))
        for name in SHAPES:
            same = torch.equal(found[name], expected[name])
            assert same, f"{name} depends on what was merged before it; seed a torch.Generator from `name`"

    def test_no_difference_to_the_base_is_the_base(self) -> None:
        """Where a base is needed, models that equal it merge to it."""
        if not self.method.needs_base:
            pytest.skip("it needs no base")
        for name in SHAPES:
            base = tensor(name, 99)
            count = max(self.inputs, self.method.least_inputs)
            off = apart(self.make().merge(name, [base.clone() for _ in range(count)], base), base)
            assert off < CLOSE, f"{name}: models that equal the base merge to {off:.1e} from it"


def tensor(name: str, model: int) -> torch.Tensor:
    """Return the tensor `name` of the model numbered `model`, always the same."""
    return torch.randn(SHAPES[name], generator=seeded(1000 * list(SHAPES).index(name) + model))
