"""A process reward model: whether a step is right, for every step of a solution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from luthier import Codec, DataError, Loss, Objective, Pack, Policy, Register, Row, Tree, hookimpl, option
from luthier_toolkits.rewards import check_separator, step_tree

_LABELS = {1: 1.0, 0: 0.0, "+": 1.0, "-": 0.0}  # True is 1


@dataclass(frozen=True)
class ProcessReward(Objective):
    """Mean binary cross-entropy of steps, ``−y log σ(r) − (1 − y) log σ(−r)``, r at a step's last token.

    A row has ``prompt``, ``steps`` (a list of texts) and ``labels``, one a step: true or 1 of a right one.
    Saved as transformers' model for token classification with one label.
    """

    source: ClassVar[str] = (
        "Uesato et al. 2022, arXiv 2211.14275, section 2.3; Lightman et al. 2023, arXiv 2305.20050, "
        "section 2.6"
    )
    head: ClassVar[str | None] = "token"
    holds: ClassVar[Mapping[str, str]] = {"score": "head"}
    branch_names: ClassVar[tuple[str, ...]] = ("solution",)
    example_rows: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"prompt": "What is 2 + 3 + 4?", "steps": ["2 + 3 = 5", "5 + 4 = 10"], "labels": [True, False]},
        {"prompt": "What is 1 + 1?", "steps": ["1 + 1 = 2"], "labels": [True]},
        {"prompt": "What is 7 - 2?", "steps": ["7 - 2 = 4", "4 is it", "So 4"], "labels": [0, 0, 0]},
    )

    separator: str = option("\n", "What stands between two steps; every step ends with it.")

    def __post_init__(self) -> None:
        """Check the separator.

        Raises:
            ConfigError: It is empty.
        """
        check_separator(self.separator)

    def encode(self, row: Row, codec: Codec) -> Tree:
        """Return the prompt with the solution, its steps' ends scored and their labels among its values.

        Raises:
            UnusableRowError: There is no step.
            DataError: A column is missing or of another type, or steps and labels differ in number.
        """
        fields = row.fields
        if fields.get("prompt") is None or any(
            not isinstance(fields.get(k), list) for k in ("steps", "labels")
        ):
            has = ", ".join(name for name, value in fields.items() if value is not None) or "nothing"
            raise DataError(
                f"{row.origin}: has {has}; process_reward expects 'prompt' and the lists 'steps' and "
                "'labels'; rename with data.columns, e.g. data.columns.steps=completions"
            )
        steps, labels = fields["steps"], fields["labels"]
        if len(steps) != len(labels):
            raise DataError(f"{row.origin}: {len(steps)} steps and {len(labels)} labels; expected one a step")
        tree = step_tree(fields["prompt"], steps, codec, row.origin, self.separator, fields.get("tools"))
        return replace(
            tree, values={str(n): _label(label, n, row.origin) for n, label in enumerate(labels, 1)}
        )

    def loss(self, policy: Policy, pack: Pack) -> Loss:
        """Return the summed cross-entropy; its weight is the number of steps."""
        scores = policy.scores(pack, pack.places)
        labels = scores.new_tensor([
            tree.values[str(number)]
            for tree in pack.trees
            for number in range(1, len(tree.branches[0].scored_places) + 1)
        ])  # fmt: skip
        total = F.binary_cross_entropy_with_logits(scores, labels, reduction="sum")
        return Loss(total, len(labels), self._metrics(scores.detach(), labels > 0.5))

    def weigh(self, tree: Tree) -> float:
        """Return the number of steps."""
        return float(tree.scored_tokens)

    def _metrics(self, scores: Tensor, right: Tensor) -> dict[str, tuple[Tensor, float]]:
        steps, flagged = float(len(scores)), scores <= 0  # called wrong
        counts = {"caught": flagged & ~right, "alarms": flagged & right, "missed": ~flagged & ~right}
        metrics = {"step_accuracy": ((~flagged == right).sum(), steps), "right_steps": (right.sum(), steps)}
        return metrics | {f"raw/{name}": (which.sum(), steps) for name, which in counts.items()}

    def summarise(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """Return the metrics with precision, recall and F1 of wrong steps."""
        raw = {name: means.get(f"raw/{name}", 0.0) for name in ("caught", "alarms", "missed")}
        metrics = {name: value for name, value in means.items() if not name.startswith("raw/")}
        caught = raw["caught"]
        for name, others in (("precision", raw["alarms"]), ("recall", raw["missed"])):
            metrics[f"wrong_steps/{name}"] = caught / (caught + others) if caught + others else 0.0
        both = 2 * caught + raw["alarms"] + raw["missed"]
        return {**metrics, "f1": 2 * caught / both if both else 0.0}


def _label(value: Any, number: int, origin: str) -> float:
    if not isinstance(value, bool | int | str) or value not in _LABELS:
        raise DataError(f"{origin}: label {number} must be true or false (or 1, 0, '+', '-'), got {value!r}")
    return _LABELS[value]


@hookimpl
def register_objectives(register: Register) -> None:
    """Register `process_reward`."""
    register("process_reward", ProcessReward)
