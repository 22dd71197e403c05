"""Luthier fine-tunes and aligns language models; every method is a plugin.

The public names load on first use, so that ``luthier --help`` and ``luthier plugins`` need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.adam import AdamOptimiser, module_of
    from luthier.adapter import Adapter
    from luthier.bnb import BitsAndBytesQuantiser
    from luthier.bnb_adam import BitsAndBytesAdam
    from luthier.calibration import calibration_metrics, correlation_metrics, draw_calibration, summarised
    from luthier.codec import Codec, Supervise
    from luthier.config import build_method, compose
    from luthier.data_source import DataSource, Row
    from luthier.discovery import Plugin, plugins
    from luthier.dropping import kept_at_random
    from luthier.errors import (
        ConfigError,
        DataError,
        GuardError,
        LuthierError,
        ModelError,
        PluginError,
        UnusableRowError,
        unknown,
    )
    from luthier.file_source import FileSource, file_sources, parse_json, text_lines, without_nulls
    from luthier.folding import FoldReport, fold
    from luthier.hookspecs import Register, hookimpl
    from luthier.in_backward import ProjectedAdamInBackward
    from luthier.judge import judge_of
    from luthier.labelled import check_labels, label_findings, labelled_sides, labelled_tree, with_mismatched
    from luthier.linear_adapter import (
        AdaptedLinear,
        LinearAdapter,
        copy_state,
        linear_shape,
        refuse_adapted,
        weight_of,
    )
    from luthier.low_rank import low_rank_linear, principal_part
    from luthier.low_rank_adapter import LowRankAdapter
    from luthier.measuring import evaluate
    from luthier.merge_report import MergeReport
    from luthier.merger import Group, Groups, Merger, agreed_mean, check_weights, shares_of, weights_of
    from luthier.merging import merge
    from luthier.method import option
    from luthier.metric_text import grouped_metrics, plain_metrics
    from luthier.objective import Finding, Loss, Objective
    from luthier.online import LOGPROB, REFERENCE, VALUE, Credited, OnlineObjective, Rollout
    from luthier.optimiser import InBackward, Optimiser
    from luthier.pair_rows import pair_tree
    from luthier.pairs import (
        PairedObjective,
        PairRows,
        Side,
        check_positive,
        check_share,
        log1mexp,
        preference_metrics,
    )
    from luthier.peft_folder import load_adapter
    from luthier.planning import PlanResult, plan
    from luthier.policy import Logprobs, Policy
    from luthier.previewing import PreviewResult, preview
    from luthier.projected_adam import ProjectedAdam
    from luthier.quantiser import Quantiser
    from luthier.redaction import without_secrets
    from luthier.report import EvaluationReport, Sample, StepReport, TrainResult
    from luthier.returns import advantages, explained_variance, kl_estimate, steered
    from luthier.reward_model import Candidate, Place, RewardModel, Scorer, text_of
    from luthier.row_filter import RowFilter
    from luthier.sample_report import SampleResult
    from luthier.sampling import sample
    from luthier.saving import save_model
    from luthier.screen import Screen
    from luthier.selection import Largest, largest
    from luthier.selector import Selector
    from luthier.steps import check_separator, split_steps, step_tree
    from luthier.targets import is_target, select_matrices
    from luthier.tracker import Tracker
    from luthier.training import train
    from luthier.tree import Branch, Pack, Tree
    from luthier.weight_norm import row_norms, squared_row_norms, weight_normed_linear

_HOMES = {
    "adam": "AdamOptimiser module_of",
    "adapter": "Adapter",
    "bnb": "BitsAndBytesQuantiser",
    "bnb_adam": "BitsAndBytesAdam",
    "calibration": "calibration_metrics correlation_metrics draw_calibration summarised",
    "codec": "Codec Supervise",
    "config": "build_method compose",
    "data_source": "DataSource Row",
    "discovery": "Plugin plugins",
    "dropping": "kept_at_random",
    "errors": "ConfigError DataError GuardError LuthierError ModelError PluginError UnusableRowError unknown",
    "file_source": "FileSource file_sources parse_json text_lines without_nulls",
    "folding": "FoldReport fold",
    "hookspecs": "Register hookimpl",
    "in_backward": "ProjectedAdamInBackward",
    "judge": "judge_of",
    "labelled": "check_labels label_findings labelled_sides labelled_tree with_mismatched",
    "selection": "Largest largest",
    "linear_adapter": "AdaptedLinear LinearAdapter copy_state linear_shape refuse_adapted weight_of",
    "low_rank": "low_rank_linear principal_part",
    "low_rank_adapter": "LowRankAdapter",
    "measuring": "evaluate",
    "merge_report": "MergeReport",
    "merger": "Group Groups Merger agreed_mean check_weights shares_of weights_of",
    "merging": "merge",
    "method": "option",
    "metric_text": "grouped_metrics plain_metrics",
    "objective": "Finding Loss Objective",
    "online": "LOGPROB REFERENCE VALUE Credited OnlineObjective Rollout",
    "optimiser": "InBackward Optimiser",
    "pair_rows": "pair_tree",
    "pairs": "PairRows PairedObjective Side check_positive check_share log1mexp preference_metrics",
    "peft_folder": "load_adapter",
    "planning": "PlanResult plan",
    "policy": "Logprobs Policy",
    "previewing": "PreviewResult preview",
    "projected_adam": "ProjectedAdam",
    "quantiser": "Quantiser",
    "redaction": "without_secrets",
    "report": "EvaluationReport Sample StepReport TrainResult",
    "returns": "advantages explained_variance kl_estimate steered",
    "reward_model": "Candidate Place RewardModel Scorer text_of",
    "row_filter": "RowFilter",
    "sample_report": "SampleResult",
    "sampling": "sample",
    "saving": "save_model",
    "screen": "Screen",
    "selector": "Selector",
    "steps": "check_separator split_steps step_tree",
    "targets": "is_target select_matrices",
    "tracker": "Tracker",
    "training": "train",
    "tree": "Branch Pack Tree",
    "weight_norm": "row_norms squared_row_norms weight_normed_linear",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "LOGPROB",
    "REFERENCE",
    "VALUE",
    "AdamOptimiser",
    "AdaptedLinear",
    "Adapter",
    "BitsAndBytesAdam",
    "BitsAndBytesQuantiser",
    "Branch",
    "Candidate",
    "Codec",
    "ConfigError",
    "Credited",
    "DataError",
    "DataSource",
    "EvaluationReport",
    "FileSource",
    "Finding",
    "FoldReport",
    "Group",
    "Groups",
    "GuardError",
    "InBackward",
    "Largest",
    "LinearAdapter",
    "Logprobs",
    "Loss",
    "LowRankAdapter",
    "LuthierError",
    "MergeReport",
    "Merger",
    "ModelError",
    "Objective",
    "OnlineObjective",
    "Optimiser",
    "Pack",
    "PairRows",
    "PairedObjective",
    "Place",
    "PlanResult",
    "Plugin",
    "PluginError",
    "Policy",
    "PreviewResult",
    "ProjectedAdam",
    "ProjectedAdamInBackward",
    "Quantiser",
    "Register",
    "RewardModel",
    "Rollout",
    "Row",
    "RowFilter",
    "Sample",
    "SampleResult",
    "Scorer",
    "Screen",
    "Selector",
    "Side",
    "StepReport",
    "Supervise",
    "Tracker",
    "TrainResult",
    "Tree",
    "UnusableRowError",
    "advantages",
    "agreed_mean",
    "build_method",
    "calibration_metrics",
    "check_labels",
    "check_positive",
    "check_separator",
    "check_share",
    "check_weights",
    "compose",
    "copy_state",
    "correlation_metrics",
    "draw_calibration",
    "evaluate",
    "explained_variance",
    "file_sources",
    "fold",
    "grouped_metrics",
    "hookimpl",
    "is_target",
    "judge_of",
    "kept_at_random",
    "kl_estimate",
    "label_findings",
    "labelled_sides",
    "labelled_tree",
    "largest",
    "linear_shape",
    "load_adapter",
    "log1mexp",
    "low_rank_linear",
    "merge",
    "module_of",
    "option",
    "pair_tree",
    "parse_json",
    "plain_metrics",
    "plan",
    "plugins",
    "preference_metrics",
    "preview",
    "principal_part",
    "refuse_adapted",
    "row_norms",
    "sample",
    "save_model",
    "select_matrices",
    "shares_of",
    "split_steps",
    "squared_row_norms",
    "steered",
    "step_tree",
    "summarised",
    "text_lines",
    "text_of",
    "train",
    "unknown",
    "weight_normed_linear",
    "weight_of",
    "weights_of",
    "with_mismatched",
    "without_nulls",
    "without_secrets",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'luthier' has no attribute '{name}'")
    return getattr(importlib.import_module(f"luthier.{_HOME[name]}"), name)
