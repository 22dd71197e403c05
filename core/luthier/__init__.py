"""Luthier fine-tunes and aligns language models; every method is a plugin.

The public names load on first use, so that ``luthier --help`` and ``luthier plugins`` need no torch. Besides
those below, every command that takes a config is a function here: ``luthier.merge(config)``.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier.adapters.adapted_module import base_of as base_of
    from luthier.adapters.conv1d import is_conv1d as is_conv1d
    from luthier.adapters.linear_adapter import (
        AdaptedLinear as AdaptedLinear,
        LinearAdapter as LinearAdapter,
        copy_state as copy_state,
        linear_shape as linear_shape,
        refuse_adapted as refuse_adapted,
        weight_of as weight_of,
    )
    from luthier.adapters.peft_folder import load_adapter as load_adapter
    from luthier.adapters.targets import is_target as is_target, select_matrices as select_matrices
    from luthier.commands.train import train as train
    from luthier.config.building import build_method as build_method
    from luthier.config.composition import compose as compose
    from luthier.contracts.adapter import Adapter as Adapter
    from luthier.contracts.command import Command as Command
    from luthier.contracts.data_source import DataSource as DataSource, Row as Row, spoken as spoken
    from luthier.contracts.hookspecs import Register as Register, hookimpl as hookimpl
    from luthier.contracts.merger import Group as Group, Groups as Groups, Merger as Merger
    from luthier.contracts.method import option as option
    from luthier.contracts.objective import Finding as Finding, Loss as Loss, Objective as Objective
    from luthier.contracts.optimiser import InBackward as InBackward, Optimiser as Optimiser
    from luthier.contracts.quantiser import Quantiser as Quantiser
    from luthier.contracts.reward_model import (
        Candidate as Candidate,
        Place as Place,
        RewardModel as RewardModel,
        Scorer as Scorer,
        text_of as text_of,
    )
    from luthier.contracts.row_filter import RowFilter as RowFilter
    from luthier.contracts.selector import Selector as Selector
    from luthier.contracts.tracker import Tracker as Tracker
    from luthier.data.formats import laid_out as laid_out
    from luthier.errors import (
        ConfigError as ConfigError,
        DataError as DataError,
        GuardError as GuardError,
        LuthierError as LuthierError,
        ModelError as ModelError,
        PluginError as PluginError,
        UnusableRowError as UnusableRowError,
        unknown as unknown,
    )
    from luthier.evaluation.evaluate import evaluate as evaluate
    from luthier.kernels.matmul import product as product
    from luthier.policy.model_policy import ModelPolicy as ModelPolicy
    from luthier.policy.policy import Logprobs as Logprobs, Policy as Policy
    from luthier.policy.references import keys_of as keys_of
    from luthier.registry.discovery import plugins as plugins
    from luthier.runs.report import (
        EvaluationReport as EvaluationReport,
        Sample as Sample,
        StepReport as StepReport,
        TrainResult as TrainResult,
    )
    from luthier.system.precision import pick_dtype as pick_dtype
    from luthier.text.codec import Codec as Codec, Supervise as Supervise
    from luthier.text.json_values import parse_json as parse_json
    from luthier.trees.tree import Branch as Branch, Pack as Pack, Tree as Tree

_load, __dir__, __all__ = attach(__name__)


def __getattr__(name: str) -> Any:
    # A room is imported as a module, which asks here first.
    if name in __all__ or name.startswith("_") or find_spec(f"{__name__}.{name}"):
        return _load(name)
    from luthier.registry import command, command_names

    return command(name).run if name in command_names() else _load(name)
