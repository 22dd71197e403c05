"""Objectives that learn from what the policy itself answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from luthier import Codec, ConfigError, DataError, Objective, Row, Tree, option
from luthier.data import asked
from luthier_toolkits.online.rollout import Credited, Rollout, made_up

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from luthier.contracts import Measured
    from luthier.engine import TrainingRun
    from luthier.evaluation import Evaluator
    from luthier.system import Processes
    from luthier_toolkits.online.rollouts import Rollouts


@dataclass(frozen=True, kw_only=True)
class OnlineObjective(Objective):
    """Rolls out answers to prompts, has them scored, and takes some steps on them, again and again.

    Rows are prompts; `reward_models` score answers. See `Rollouts` for how.
    """

    keeps_rows: ClassVar[bool] = True
    takes_auxiliary: ClassVar[bool] = False
    branch_names: ClassVar[tuple[str, ...]] = ()

    rollout_batch_size: int = option(64, "Prompts of one rollout.", was="rollout")
    samples_per_prompt: int = option(
        1, "Answers to each prompt; the prompt is computed once for them.", was="n"
    )
    rollout_epochs: int = option(4, "Passes over the answers of a rollout.", was="reuse")
    max_new_tokens: int = option(64, "Tokens an answer may have.")
    generation_batch_size: int = option(64, "Answers made at a time.", was="together")

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: One of them is below 1.
        """
        for name in (field.name for field in fields(OnlineObjective)):
            if getattr(self, name) < 1:
                raise ConfigError(f"objective.{name}={getattr(self, name)} must be at least 1")

    def encode(self, row: Row, codec: Codec) -> Tree:
        """Return the prompt of `row`, a tree that answers will continue.

        Raises:
            DataError: The row has none.
        """
        if (answered := asked(row)) is None:
            has = ", ".join(row.fields) or "nothing"
            raise DataError(f"{row.origin}: has {has}; an answer needs 'prompt'; rename with data.columns")
        prompt = codec.prompt_ids(answered.fields["prompt"], row.origin, row.fields.get("tools"))
        return Tree(tuple(prompt), (), row.origin)

    def check_run(self, config: DictConfig, processes: Processes) -> None:
        """Refuse what no rollout can be made of.

        Raises:
            ConfigError: With what to choose instead.
        """
        name = config.objective.name
        if not config.reward_models:
            raise ConfigError(
                f"objective={name} needs something that scores answers: choose reward_model=[NAME, …]"
            )
        if config.reference.model:
            raise ConfigError(
                f"objective={name} compares with the model as it is before the first step; leave out "
                "reference.model, or start from that model with model.path"
            )
        if processes.sharded:
            raise ConfigError(f"objective={name} answers with the whole model: launch without --use_fsdp")

    def check_evaluation(self, name: str) -> None:
        """Refuse: there are no reward models where nothing trains.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"objective={name} is measured while it trains; its result answers under objective=sft"
        )

    def batches(self, run: TrainingRun) -> Rollouts:
        """Return the rollouts of `run`, whose reference is its policy as it is now.

        Raises:
            DataError: A prompt leaves no room for an answer; its row is named.
        """
        from luthier_toolkits.online.start import rollouts_of  # it imports transformers

        return rollouts_of(run, self)

    def evaluate(self, evaluator: Evaluator, answer: bool) -> Measured:
        """Return the reward of greedy answers, whatever `answer` says; less of it is more loss."""
        from luthier_toolkits.online.evaluation import rewarded
        from luthier_toolkits.online.rollouts import Rollouts

        assert isinstance(evaluator.batches, Rollouts)
        return rewarded(evaluator, evaluator.batches.scoring)

    def trial(self, trees: Sequence[Tree]) -> Sequence[Tree]:
        """Return `trees` with what made-up answers are worth."""
        return self.credit(made_up(trees), {}).trees

    def weigh(self, tree: Tree) -> float:
        """Return the tokens of its answers."""
        return float(tree.scored_tokens)

    def fault(self, tree: Tree) -> str | None:
        """Return None: a prompt is enough."""
        return None

    @abstractmethod
    def credit(self, rollout: Rollout, state: Mapping[str, float]) -> Credited:
        """Return what each token of `rollout` is worth; the same for the same arguments.

        Args:
            rollout: What the policy answered.
            state: What the credit of the rollout before gave; empty at first.

        Raises:
            GuardError: Training should not go on.
        """
