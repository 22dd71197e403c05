"""The hook specifications: every way a plugin can reach into Luthier.

Registration hooks add methods, others answer a question of core, lifecycle hooks only observe. What changes a
run is always a configured object, so the saved config tells the whole story.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from omegaconf import DictConfig
    from torch import nn

    from luthier.data import Batches
    from luthier.engine import TrainingRun
    from luthier.runs import EvaluationReport, StepReport, TrainResult

PROJECT = "luthier"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

Register = Callable[[str, type[Any]], None]
"""``register("lora", LoRA)``: a name matching ``[a-z][a-z0-9_]*``, and a frozen dataclass of the kind."""


class Registration:
    """Called once for every plugin when the catalogue loads. An exception reports the plugin as broken."""

    @hookspec
    def register_adapters(self, register: Register) -> None:
        """Register `luthier.Adapter` classes: which parameters train and how a linear layer changes."""

    @hookspec
    def register_quantisers(self, register: Register) -> None:
        """Register `luthier.Quantiser` classes: how the frozen base weights are stored."""

    @hookspec
    def register_optimisers(self, register: Register) -> None:
        """Register `luthier.Optimiser` classes: what builds the `torch.optim.Optimizer`."""

    @hookspec
    def register_objectives(self, register: Register) -> None:
        """Register `luthier.Objective` classes: how a row becomes a token tree, and the loss on it."""

    @hookspec
    def register_reward_models(self, register: Register) -> None:
        """Register `luthier.RewardModel` classes: scores of completions."""

    @hookspec
    def register_selectors(self, register: Register) -> None:
        """Register `luthier.Selector` classes: which of several answers is taken."""

    @hookspec
    def register_mergers(self, register: Register) -> None:
        """Register `luthier.Merger` classes: one tensor out of the same tensor of several models."""

    @hookspec
    def register_data_sources(self, register: Register) -> None:
        """Register `luthier.DataSource` classes: rows with their origin, and how an answer is verified."""

    @hookspec
    def register_row_filters(self, register: Register) -> None:
        """Register `luthier.RowFilter` classes: what keeps, rewrites or drops a row, and why."""

    @hookspec
    def register_trackers(self, register: Register) -> None:
        """Register `luthier.Tracker` classes: lifecycle observers that a run can configure."""

    @hookspec
    def register_commands(self, register: Register) -> None:
        """Register a `luthier.Command` class, alone in an entry point ``command.NAME``."""

    @hookspec
    def config_packages(self) -> str:
        """Return the dotted name of a package with YAML presets, e.g. ``"luthier_toy.conf"``.

        It is appended to Hydra's search path, so built-in presets of the same name win.
        """
        raise AssertionError("a specification is never called")


class Answers:
    """Questions of which the first answer that is not None counts."""

    @hookspec(firstresult=True)
    def find_model(self, name: str | None, package: str | None) -> Path | None:
        """Return a transformers folder with safetensors for a model in another format; None: not mine.

        Args:
            name: What the option ``model.path`` names, if it is set.
            package: The installed Python package that ``model.gguf_package`` names, if it is set.

        Raises:
            ModelError: The model is of this format and cannot be used.
        """

    @hookspec(firstresult=True)
    def forecast_memory(
        self, run: TrainingRun, batches: Batches, optimiser: torch.optim.Optimizer, total_steps: int
    ) -> float | None:
        """Return the memory in MiB that the steps of `run` will take; None: it cannot be said.

        Called by the main process before the first step. `optimiser` is the one that was built, with the
        states it has so far: those of a resumed run.
        """


class Lifecycle:
    """Called during a run, in this order. Implementations observe; what they raise ends the run."""

    @hookspec
    def after_config_composed(self, config: DictConfig) -> None:
        """The composed `config` passed every check; nothing has been loaded yet."""

    @hookspec
    def after_model_prepared(self, model: nn.Module, config: DictConfig) -> None:
        """The model is loaded and the adapter attached; ``requires_grad`` is final."""

    @hookspec
    def while_measuring(self, what: str, done: int, total: int) -> None:
        """Of what is measured before training (the ``reference``), `done` of `total` completions are done."""

    @hookspec
    def after_header(self, lines: list[str]) -> None:
        """What will run, in a few lines: model, data with what was dropped and why, steps."""

    @hookspec
    def before_train(self, run_dir: Path, config: DictConfig, total_steps: int, start_step: int) -> None:
        """The next optimiser step follows. `run_dir` exists and holds ``config.yaml``.

        `start_step` steps are done: 0, or those of the checkpoint that is resumed. What a tracker wrote
        about later ones belongs to a run that was killed, and will be reported again.
        """

    @hookspec
    def after_step(self, report: StepReport) -> None:
        """A logging point was reached (every `log_every` steps and at the last one)."""

    @hookspec
    def after_evaluation(self, report: EvaluationReport) -> None:
        """An evaluation on the held-out rows ended."""

    @hookspec
    def after_checkpoint_saved(self, folder: Path) -> None:
        """`folder` is complete on disk."""

    @hookspec
    def after_train(self, result: TrainResult) -> None:
        """The result is saved and read back; ``summary.json`` is written."""

    @hookspec
    def after_multirun(self, runs: list[tuple[str, Path]]) -> None:
        """All jobs ended; of each job the overrides that tell it from the others, and its folder."""

    @hookspec
    def on_train_error(self, error: BaseException) -> None:
        """The run ends with `error` (Ctrl-C included), which is raised again after this call."""


SPECIFICATIONS = (Registration, Answers, Lifecycle)
"""Every class of hook specifications."""
