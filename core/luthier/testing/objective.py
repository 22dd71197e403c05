"""The suite of objectives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from transformers import PreTrainedModel

from luthier.contracts import Loss, Objective, Row
from luthier.engine import pooled
from luthier.errors import DataError
from luthier.models import attach_head
from luthier.policy import ModelPolicy, References
from luthier.system import Processes
from luthier.testing.models import tiny_gpt2, tiny_llama, tiny_tokenizer
from luthier.testing.suite import Suite, apart, seeded
from luthier.text import Codec
from luthier.trees import Branch, Pack, Tree

ROWS: tuple[Mapping[str, Any], ...] = (
    {"prompt": "What is 12 + 7?", "completion": " The answer is 19."},
    {"prompt": "one two", "completion": " three four five"},
    {"prompt": "The capital of France is", "completion": " Paris"},
)
SAME = 1e-5
"""fp32 sums in another order."""


class ObjectiveSuite(Suite):
    """What an `luthier.Objective` promises, on a Llama of two layers.

    Attributes:
        rows: Rows it takes, at least two; by default the method's `example_rows`, or prompt and completion.
        scores_tokens: Its loss is about scored tokens only, so tokens behind the last of them do not count.
    """

    method: ClassVar[type[Objective]]
    rows: ClassVar[Sequence[Mapping[str, Any]]] = ()
    scores_tokens: ClassVar[bool] = True

    def trees(self) -> list[Tree]:
        """Return the rows encoded, with what they need of each other."""
        codec, made = Codec(tiny_tokenizer()), self.make()
        rows = self.rows or self.method.example_rows or ROWS
        encoded = [
            made.encode(Row(dict(fields), f"row {number}"), codec) for number, fields in enumerate(rows)
        ]
        trees = [
            tree for made_of in encoded for tree in ([made_of] if isinstance(made_of, Tree) else made_of)
        ]
        return list(made.complete(made.trial(trees), seeded()))

    def policy(self, model: PreTrainedModel) -> ModelPolicy:
        """Return `model` as a policy, with a made-up reference or head where the loss asks for one."""
        if self.method.head:
            head = attach_head(model, self.method.head, seeded()).to(model.dtype)
            torch.nn.init.normal_(head.weight, std=0.1, generator=seeded(2))
        policy = ModelPolicy(model)
        policy.references = MadeUp(torch.empty(0, dtype=torch.int64), torch.empty(0))
        return policy

    def measured(
        self, policy: ModelPolicy, trees: Sequence[Tree], known: Mapping[str, float] | None = None
    ) -> Loss:
        """Return the loss of `trees` in one pack: the whole step, or a part of one with `known` pooled."""
        loss: Loss = self.make().loss(policy, Pack.of(trees, pooled=known))
        return loss

    def test_rows_become_trees(self) -> None:
        """`encode` gives a tree with the row's origin, something scored, and the same tree every time."""
        trees = self.trees()
        assert len(trees) >= 2, "give the suite at least two rows"
        vocabulary = len(tiny_tokenizer())
        for number, tree in enumerate(trees):
            assert isinstance(tree, Tree), f"encode must return a luthier.Tree, got {type(tree).__name__}"
            assert tree.origin == f"row {number}", "give the tree its row's origin: messages name it"
            assert tree.scored_tokens, f"{tree.origin}: no token is scored, so nothing is learned from it"
            ids = [*tree.prompt, *(token for branch in tree.branches for token in branch.ids)]
            assert all(0 <= token < vocabulary for token in ids), f"{tree.origin}: ids outside the vocabulary"
        assert trees == self.trees(), "encoding a row twice gives two trees; encode must not draw anything"

    def test_a_row_without_its_fields_is_refused_by_name(self) -> None:
        """A row that lacks what the objective needs is a `DataError` that names the row's origin."""
        try:
            self.make().encode(Row({"nothing": "useful"}, "rows.jsonl:7"), Codec(tiny_tokenizer()))
        except DataError as error:
            if "rows.jsonl:7" not in str(error):
                pytest.fail(f"the message must name row.origin: {error}")
        else:
            pytest.fail("encode accepted a row without any of its fields; raise luthier.DataError")

    def test_the_loss_is_a_sum_with_its_weight(self) -> None:
        """`total` is a finite, differentiable scalar; twice the trees are twice the total and the weight."""
        policy, trees = self.policy(tiny_llama()), self.trees()
        once, twice = self.measured(policy, trees), self.measured(policy, [*trees, *trees])
        assert once.total.shape == (), f"total must be a scalar, got shape {tuple(once.total.shape)}"
        assert once.total.requires_grad, "total is not differentiable; do not detach it"
        assert torch.isfinite(once.total), f"total is {_number(once.total)}"
        assert once.weight > 0, f"weight is {once.weight}: the engine divides by it"
        for name, (mine, other) in parts(once, twice).items():
            assert abs(2 * mine - other) <= SAME * max(1, abs(other)), (
                f"{name} of a batch and of two copies: {mine:.6f}, {other:.6f}; return sums, never means"
            )

    def test_trees_weigh_what_the_loss_is_divided_by(self) -> None:
        """`weigh`, summed over the trees of a pack, is the loss's weight: by it objectives are combined."""
        policy, trees = self.policy(tiny_llama()), self.trees()
        weight, weighed = self.measured(policy, trees).weight, sum(map(self.make().weigh, trees))
        assert weight == weighed, f"the loss's weight is {weight}, but `weigh` says {weighed} for its trees"

    def test_packing_changes_nothing(self) -> None:
        """However a step's trees are cut into packs, totals, weights, metrics and gradients add up."""
        trees, results = self.trees(), []
        for packs in ([trees], [[tree] for tree in trees], [trees[1:], trees[:1]], [trees[::-1]]):
            policy = self.policy(tiny_llama())
            known = pooled(policy, self.make(), packs, Processes())
            losses = [self.measured(policy, pack, known) for pack in packs]
            for loss in losses:
                loss.total.backward()  # type: ignore[no-untyped-call]
            summed = {
                name: sum(values[name][0] for values in (parts(loss, loss) for loss in losses))
                for name in parts(losses[0], losses[0])
            }
            results.append((summed, gradient(policy)))
        for summed, direction in results[1:]:
            for name, value in summed.items():
                expected = results[0][0][name]
                assert abs(value - expected) <= SAME * max(1, abs(expected)), (
                    f"{name} depends on packing: {expected:.6f} in one pack, {value:.6f} in others"
                )
            off = float((direction - results[0][1]).norm() / results[0][1].norm())
            assert off < SAME, (
                f"the gradient depends on packing: {off:.1e} apart; a tree must see only itself"
            )

    def test_its_gradient_is_the_slope_of_its_loss(self) -> None:
        """In fp64, the derivative along a random direction agrees with a central difference."""
        # Not a Llama, whose norms compute in fp32 whatever its weights are.
        policy, trees = self.policy(tiny_gpt2().double()), self.trees()
        # What is pooled over a step is a constant of its packs.
        known = pooled(policy, self.make(), [trees, trees], Processes())
        loss = self.measured(policy, trees, known)
        loss.total.backward()  # type: ignore[no-untyped-call]
        parameters = list(policy.model.parameters())
        directions = [torch.randn(p.shape, generator=seeded(1), dtype=p.dtype) for p in parameters]
        slope = sum(
            float((p.grad * direction).sum())
            for p, direction in zip(parameters, directions, strict=True)
            if p.grad is not None
        )
        values = []
        for size in (1e-5, -2e-5):
            with torch.no_grad():
                for p, direction in zip(parameters, directions, strict=True):
                    p.add_(direction, alpha=size)
                values.append(_number(self.measured(policy, trees, known).total))
        measured = (values[0] - values[1]) / 2e-5
        assert abs(slope - measured) <= 1e-4 * max(1, abs(measured)), (
            f"the gradient says {slope:.6f}, differences say {measured:.6f}; is a part of the loss detached?"
        )

    def test_tokens_that_are_not_scored_and_follow_change_nothing(self) -> None:
        """Tokens behind the last scored one are no part of the loss: nothing is predicted from the future."""
        if not self.scores_tokens:
            pytest.skip("the suite says that its loss is not about scored tokens")
        policy, trees = self.policy(tiny_llama()), self.trees()
        longer = [dataclasses.replace(tree, branches=tuple(map(_tailed, tree.branches))) for tree in trees]
        for name, (mine, other) in parts(self.measured(policy, trees), self.measured(policy, longer)).items():
            assert abs(mine - other) <= SAME * max(1, abs(mine)), (
                f"{name} changes from {mine:.6f} to {other:.6f} with unscored tokens behind; "
                "use policy.logprobs, which holds the scored ones only"
            )

    def test_equal_packs_have_equal_losses(self) -> None:
        """The loss of a pack is the same every time, and torch's global random state is left as it was."""
        policy, trees = self.policy(tiny_llama()), self.trees()
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = self.measured(policy, trees)
        assert torch.equal(state, torch.get_rng_state()), "loss draws from torch's global generator"
        second = self.measured(policy, trees)
        assert apart(second.total.detach(), first.total.detach()) == 0, "two equal packs have two losses"


class MadeUp(References):
    """A reference that knows every completion: what it gives depends on the scored tokens alone."""

    def sums(self, pack: Pack) -> torch.Tensor:
        """Return (C,) float32, about what a small model without training gives."""
        scored = [
            [branch.ids[place] for place in branch.scored_places]
            for tree in pack.trees
            for branch in tree.branches
        ]
        return torch.tensor([-4.5 * len(ids) + 0.02 * (sum(ids) % 50) for ids in scored])


def _tailed(branch: Branch) -> Branch:
    scored = branch.scored or (True,) * len(branch.ids)
    longer, unscored = (*branch.ids, 5, 6, 7), (*scored, False, False, False)
    return dataclasses.replace(branch, ids=longer, scored=unscored)


def parts(first: Loss, second: Loss) -> dict[str, tuple[float, float]]:
    """Return every number of two losses, side by side."""
    assert first.metrics.keys() == second.metrics.keys(), "metrics have other names for other packs"
    numbers = {
        "total": (_number(first.total), _number(second.total)),
        "weight": (first.weight, second.weight),
    }
    for name, (value, weight) in first.metrics.items():
        numbers[f"metrics[{name!r}]"] = _number(value), _number(second.metrics[name][0])
        numbers[f"the weight of metrics[{name!r}]"] = weight, second.metrics[name][1]
    return numbers


def _number(value: torch.Tensor) -> float:
    return float(value.detach())


def gradient(policy: ModelPolicy) -> torch.Tensor:
    """Return the gradient of everything that has one, as one vector."""
    return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])
