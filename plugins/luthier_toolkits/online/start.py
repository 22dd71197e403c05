"""What an online objective needs before its first rollout: reward models, a reference, room for answers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from torch import nn

from luthier.adapters import adapted
from luthier.contracts import Place
from luthier.data import RunRows
from luthier.models import LoadedModel
from luthier.policy import Logprobs, ModelPolicy, check_room, undisturbed
from luthier.text import Codec
from luthier.trees import Pack
from luthier_toolkits.online.rollout_file import RolloutFiles
from luthier_toolkits.online.rollouts import Rollouts
from luthier_toolkits.rewards import DetachedAdapter, Scoring

if TYPE_CHECKING:
    from luthier.engine import TrainingRun
    from luthier_toolkits.online.objective import OnlineObjective

FOLDER = "rollouts"
"""Where in the run folder rollouts are kept."""


def scoring_of(config: DictConfig, loaded: LoadedModel, rows: RunRows) -> Scoring:
    """Return the reward models at work; an adapter on the policy's own base shares it."""
    place = Place(rows.source, loaded, config.model.device, config.model.dtype, config.pack_tokens)
    scoring = Scoring.of(config.reward_models, place)
    assert scoring is not None
    return scoring


def rollouts_of(run: TrainingRun, objective: OnlineObjective) -> Rollouts:
    """Return the rollouts of `run`, whose reference is its policy as it is now.

    Raises:
        DataError: A prompt leaves no room for an answer; its row is named.
    """
    scoring = scoring_of(run.config, run.loaded, run.rows)
    without_dropout(run.policy.model)
    data = run.rows.data
    check_room([tree.prompt for tree in data.trees], data.rows, run.loaded.context)
    return Rollouts(
        policy=run.policy,
        reference=frozen(run.policy),
        objective=objective,
        scoring=scoring,
        codec=Codec(run.loaded.tokenizer),
        source=run.rows.source,
        prompts=data,
        sampler=run.sampler(objective.rollout_batch_size),
        batch_size=run.config.batch_size,
        pack_tokens=run.config.pack_tokens,
        files=RolloutFiles(run.run_dir / FOLDER),
        seed=run.config.seed,
        processes=run.processes,
    )


def without_dropout(model: nn.Module) -> None:
    """Switch dropout off for good: what an answer was sampled with is what its ratio must be taken with."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def frozen(policy: ModelPolicy) -> Callable[[Pack], Logprobs]:
    """Return what gives log-probabilities under `policy` as it is now, whatever trains later.

    Of an adapter its layers are copied, over the same base; of a model that trains whole, all of it.
    """
    model = policy.model
    if adapted(model):
        detached = DetachedAdapter.copy_of(model)

        def beside(pack: Pack) -> Logprobs:
            with detached.on(model), undisturbed(model):
                return policy.logprobs(pack)

        return beside
    other = ModelPolicy(copy.deepcopy(model).requires_grad_(False), autocast_dtype=policy.autocast_dtype)

    def alone(pack: Pack) -> Logprobs:
        with undisturbed(other.model):
            return other.logprobs(pack)

    return alone
