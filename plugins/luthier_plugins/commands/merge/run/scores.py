"""A merged model's scores on held-out tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from luthier import config as configs
from luthier.config import ModelConfig
from luthier.contracts import DataSource, Objective
from luthier.data import encode
from luthier.errors import ConfigError, LuthierError, ModelError
from luthier.evaluation import EvaluationConfig, Evaluator
from luthier.models import load_tokenizer, saved_kind
from luthier.policy import policy_of
from luthier.text import Codec
from luthier_plugins.commands.merge.io.inputs import MergeInput
from luthier_plugins.commands.merge.plan.tokenizer import tokenizer_home


def check_tasks(config: DictConfig, inputs: Sequence[MergeInput]) -> None:
    """Encode every row of every task, before anything is merged.

    Raises:
        LuthierError: A task cannot be read or encoded; it is named.
    """
    if not config.tasks:
        return
    if any(saved_kind(model.config.get("architectures")) for model in inputs):
        raise ConfigError("tasks are answered by language models; these are reward models: leave them out")
    if (home := tokenizer_home(inputs)) is None:
        raise ModelError("tasks need a tokenizer, and no model has one")
    codec = Codec(load_tokenizer(str(home)))
    objective: Objective = configs.build_method("objective", {"name": "sft"})
    for task, node in config.tasks.items():
        with _naming(task):
            encode(_source(node), objective, codec, 2**20, "drop", [], True, "drop")


def task_scores(config: DictConfig, folder: Path | str) -> dict[str, float]:
    """Return for every task of `config.tasks` the share of its rows that the model in `folder` answers right.

    Where a task's rows have nothing to verify by, minus the loss.

    Raises:
        LuthierError: A task cannot be read; it is named.
    """
    from luthier.models import load_model

    loaded = load_model(ModelConfig(path=str(folder)), train_base=False)
    policy = policy_of(loaded, True, False)
    objective: Objective = configs.build_method("objective", {"name": "sft"})
    values: Any = OmegaConf.to_container(config.evaluation)
    scores = {}
    for task, node in config.tasks.items():
        with _naming(task):
            source = _source(node)
            codec = Codec(loaded.tokenizer)
            rows = encode(source, objective, codec, loaded.context or 2**20, "drop", [], True, "drop")
            evaluator = Evaluator(
                policy, objective, codec, source, rows, EvaluationConfig(**values), config.pack_tokens
            )
            report = evaluator.report(step=0, answer=True)
        scores[str(task)] = -report.loss if report.accuracy is None else report.accuracy
    return scores


def _source(node: DictConfig) -> DataSource:
    options: Any = OmegaConf.to_container(node, resolve=True)
    source: DataSource = configs.build_method("data_source", options)
    return source


@contextmanager
def _naming(task: object) -> Iterator[None]:
    try:
        yield
    except LuthierError as error:
        raise type(error)(f"tasks.{task}: {error}") from error
