"""What an online objective needs before its first rollout: reward models, a reference, room for answers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig
from torch import nn

from luthier.codec import Codec
from luthier.errors import ConfigError
from luthier.linear_adapter import adapted_layers
from luthier.model import LoadedModel
from luthier.objective import Objective
from luthier.online import OnlineObjective
from luthier.parallel import Processes
from luthier.policy import Logprobs, Policy, undisturbed
from luthier.reward_model import Place
from luthier.rollout_file import RolloutFiles
from luthier.rollouts import Rollouts
from luthier.run_data import RunRows
from luthier.sampling import check_room
from luthier.scoring import Scoring
from luthier.training_order import sampler_of
from luthier.tree import Pack
from luthier.worn import Worn

FOLDER = "rollouts"
"""Where in the run folder rollouts are kept."""


def check_online(config: DictConfig, processes: Processes) -> None:
    """Refuse what no rollout can be made of, before anything is loaded.

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


def scoring_of(config: DictConfig, loaded: LoadedModel, rows: RunRows) -> Scoring:
    """Return the reward models at work; an adapter on the policy's own base shares it."""
    place = Place(rows.source, loaded, config.model.device, config.model.dtype, config.pack_tokens)
    scoring = Scoring.of(config.reward_models, place)
    assert scoring is not None
    return scoring


def rollouts_of(
    config: DictConfig,
    run_dir: Path,
    loaded: LoadedModel,
    policy: Policy,
    objective: Objective,
    rows: RunRows,
    scoring: Scoring,
    processes: Processes,
) -> Rollouts:
    """Return the rollouts of a run, whose reference is `policy` as it is now.

    Raises:
        DataError: A prompt leaves no room for an answer; its row is named.
    """
    assert isinstance(objective, OnlineObjective)
    without_dropout(policy.model)
    check_room([tree.prompt for tree in rows.data.trees], rows.data.rows, loaded.context)
    return Rollouts(
        policy=policy,
        reference=frozen(policy),
        objective=objective,
        scoring=scoring,
        codec=Codec(loaded.tokenizer),
        source=rows.source,
        prompts=rows.data,
        sampler=sampler_of(config, len(rows.data), objective.rollout),
        batch_size=config.batch_size,
        pack_tokens=config.pack_tokens,
        files=RolloutFiles(run_dir / FOLDER),
        seed=config.seed,
        processes=processes,
    )


def without_dropout(model: nn.Module) -> None:
    """Switch dropout off for good: what an answer was sampled with is what its ratio must be taken with."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def frozen(policy: Policy) -> Callable[[Pack], Logprobs]:
    """Return what gives log-probabilities under `policy` as it is now, whatever trains later.

    Of an adapter its layers are copied, over the same base; of a model that trains whole, all of it.
    """
    model = policy.model
    if adapted_layers(model):
        worn = Worn.copy_of(model)

        def beside(pack: Pack) -> Logprobs:
            with worn.on(model), undisturbed(model):
                return policy.logprobs(pack)

        return beside
    other = Policy(copy.deepcopy(model).requires_grad_(False), autocast_dtype=policy.autocast_dtype)

    def alone(pack: Pack) -> Logprobs:
        with undisturbed(other.model):
            return other.logprobs(pack)

    return alone
