"""The suite of mergers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
import torch

from luthier.contracts import Group, Merger
from luthier.testing.suite import Suite, apart, seeded

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (20, 8),
    "model.layers.0.mlp.up_proj.weight": (12, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 12),
    "model.norm.weight": (8,),
    "model.conv.weight": (2, 3, 4),
}
CLOSE = 1e-6
BASE = 99


class MergerSuite(Suite):
    """What a `luthier.Merger` promises, tensor by tensor.

    Attributes:
        inputs: How many models are merged, where the method takes as many.
    """

    method: ClassVar[type[Merger]]
    inputs: ClassVar[int] = 3

    @property
    def models(self) -> tuple[int, ...]:
        """The numbers of the models that are merged."""
        count = max(self.inputs, self.method.least_inputs)
        return tuple(range(min(count, self.method.most_inputs or count)))

    def merged(
        self, name: str, models: Sequence[int] | None = None, run: int | None = None, order: int = 1
    ) -> torch.Tensor:
        """Return the merge of the tensor `name`, as core would do it.

        Args:
            name: One of `SHAPES`.
            models: The models' numbers; that of the base stands for a model that equals it.
            run: Elements of a group; None: the whole tensor in one, of its own shape.
            order: −1: the models in reverse.
        """
        numbers = list(self.models if models is None else models)
        labels = [f"model{place}" for place in range(len(numbers))]
        merger = self.make()
        merger.check(labels)

        def groups(of: Iterable[str] = (name,), statistics: object = None) -> Iterable[Group]:
            return [
                group
                for tensor in of
                for group in self._groups(tensor, numbers, labels, run, order, statistics)
            ]

        statistics = None
        if merger.statistics_over != "nothing":
            assert merger.workspace > 0, "statistics take room that workspace must say"
            every = SHAPES if merger.statistics_over == "model" else (name,)
            statistics = merger.collect_statistics(lambda: groups(every))
        parts = [merger.merge(group) for group in groups((name,), statistics)]
        return parts[0] if run is None else torch.cat([part.view(-1) for part in parts]).view(SHAPES[name])

    def _groups(
        self,
        name: str,
        numbers: list[int],
        labels: list[str],
        run: int | None,
        order: int,
        statistics: object,
    ) -> Iterable[Group]:
        tensors = [tensor(name, number) for number in numbers]
        base = tensor(name, BASE) if self.method.needs_base else None
        if run is None:
            yield Group(name, tuple(labels[::order]), tuple(tensors[::order]), base, 0, statistics)
            return
        for start in range(0, tensors[0].numel(), run):
            part = slice(start, start + run)
            own = tuple(tensor.view(-1)[part] for tensor in tensors[::order])
            under = None if base is None else base.view(-1)[part]
            yield Group(name, tuple(labels[::order]), own, under, start, statistics)

    def test_it_returns_float32_of_the_inputs_shape(self) -> None:
        """The result is float32 of the inputs' shape, finite, and a tensor of its own."""
        for name, shape in SHAPES.items():
            merged = self.merged(name)
            assert merged.shape == shape, f"{name}: {shape} became {tuple(merged.shape)}"
            assert merged.dtype == torch.float32, f"{name} is {merged.dtype}, not float32"
            assert torch.isfinite(merged).all(), f"{name} is not finite"

    def test_its_inputs_stay_as_they_are(self) -> None:
        """Models and base are shared with other calls and never written to."""
        for name in SHAPES:
            own = [tensor(name, model) for model in self.models]
            base = tensor(name, BASE) if self.method.needs_base else None
            before = [model.clone() for model in own]
            merger = self.make()
            group = Group(name, tuple(f"model{model}" for model in self.models), tuple(own), base)
            if merger.statistics_over != "nothing":
                statistics = merger.collect_statistics(lambda group=group: [group])
                group = Group(name, group.labels, group.tensors, base, 0, statistics)
            merger.merge(group)
            same = all(map(torch.equal, own, before))
            assert same, f"{name}: merge wrote into its inputs; work on a copy"
            assert base is None or torch.equal(base, tensor(name, BASE)), f"{name}: merge wrote into the base"

    def test_models_that_agree_stay_what_they_are(self) -> None:
        """Equal models, and the base where one is needed, merge to themselves, bit by bit."""
        for name in SHAPES:
            merged = self.merged(name, [BASE for _ in self.models])
            same = torch.equal(merged, tensor(name, BASE))
            off = apart(merged, tensor(name, BASE))
            assert same, f"{name}: models that are all alike merge to something {off:.1e} from them"

    def test_one_model_is_itself(self) -> None:
        """Where one model is enough and no base is needed, merging it changes nothing."""
        if self.method.least_inputs > 1 or self.method.needs_base:
            pytest.skip("it needs several models, or a base")
        for name in SHAPES:
            off = apart(self.merged(name, (0,)), tensor(name, 0))
            assert off < CLOSE, f"{name}: one model alone is {off:.1e} from itself; or set least_inputs = 2"

    def test_the_order_of_the_models_is_without_effect(self) -> None:
        """A method whose order matters says so: ``symmetric: ClassVar[bool] = False``."""
        if not self.method.symmetric:
            pytest.skip("its order matters, and it says so")
        for name in SHAPES:
            off = apart(self.merged(name, order=-1), self.merged(name))
            assert off < CLOSE, (
                f"{name}: in another order the result is {off:.1e} apart; set symmetric = False"
            )

    def test_pieces_are_without_effect(self) -> None:
        """A tensor merged a run of elements at a time is bit-identical: or set ``elementwise = False``."""
        if not self.method.elementwise:
            pytest.skip("it takes whole tensors, and it says so")
        for name in SHAPES:
            for run in (1, 7, 1000):
                same = torch.equal(self.merged(name, run=run), self.merged(name))
                assert same, f"{name}: in runs of {run} elements the result differs; set elementwise = False"

    def test_shards_are_without_effect(self) -> None:
        """Tensors merged in any order and from several threads are bit-identical: seeds come from names."""
        expected = {name: self.merged(name) for name in SHAPES}
        torch.manual_seed(1234)
        with ThreadPoolExecutor(4) as pool:
            backwards = list(SHAPES)[::-1]
            merged = dict(zip(backwards, pool.map(self.merged, backwards), strict=True))
        for name in SHAPES:
            same = torch.equal(merged[name], expected[name])
            assert same, f"{name} depends on what was merged before it; seed a torch.Generator from `name`"

    def test_coefficients_are_what_is_merged(self) -> None:
        """A merge with coefficients is θ_base + Σ cᵢ τᵢ; any base serves a merger that needs none."""
        labels = [f"model{place}" for place in range(len(self.models))]
        coefficients = self.make().coefficients(labels)
        if coefficients is None:
            pytest.skip("it has none")
        for name in SHAPES:
            base = tensor(name, BASE)
            models = [tensor(name, model) for model in self.models]
            expected = base + sum(c * (model - base) for c, model in zip(coefficients, models, strict=True))
            off = apart(self.merged(name), expected)
            assert off < CLOSE, f"{name}: the result is {off:.1e} from what its coefficients say"


def tensor(name: str, model: int) -> torch.Tensor:
    """Return the tensor `name` of the model numbered `model`, always the same."""
    return torch.randn(SHAPES[name], generator=seeded(1000 * list(SHAPES).index(name) + model))
