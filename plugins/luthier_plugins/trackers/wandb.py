"""Weights & Biases: config, metrics, held-out answers and the summary of a run; online or offline."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from omegaconf import DictConfig
from rich.console import Console

import luthier
from luthier import (
    ConfigError,
    EvaluationReport,
    Register,
    StepReport,
    Tracker,
    TrainResult,
    hookimpl,
    option,
)

ID_FILE = "wandb_id.txt"


@dataclass
class _State:
    config: DictConfig | None = None
    run: Any = None


@dataclass(frozen=True)
class WandB(Tracker):
    """A run on Weights & Biases; a resumed run goes on under the id it had."""

    source: ClassVar[str] = "https://docs.wandb.ai/ref/python"

    project: str | None = option(None, "The project; null: $WANDB_PROJECT, or luthier.")
    run_name: str | None = option(None, "Name of the run; null: the run folder's.")
    entity: str | None = option(None, "User or team; null: the account's own.")
    mode: Literal["online", "offline", "disabled"] | None = option(
        None, "online, offline (files to `wandb sync` later) or disabled; null: $WANDB_MODE, or online."
    )
    tags: tuple[str, ...] = option((), "Tags of the run.")
    samples: int = option(20, "Answers in the table of an evaluation.")
    _state: _State = field(default_factory=_State, init=False, repr=False, compare=False)

    @hookimpl
    def after_config_composed(self, config: DictConfig) -> None:
        """Refuse at once a wandb that is not installed, or that knows no account."""
        if self._mode == "disabled":
            return
        if self._mode == "online" and not _module().login(prompt=False, verify=False):
            raise ConfigError("tracker=wandb: nobody is logged in; run `wandb login`, or set "
                              "trackers.wandb.mode=offline and `wandb sync` later")  # fmt: skip
        self._state.config = config

    @hookimpl
    def after_header(self) -> None:
        """Open the run: model and data are sound, and the first evaluation follows."""
        config = self._state.config
        if config is None:
            return
        # wandb records the command line, where a secret may stand; the config says the same.
        argv, sys.argv = sys.argv, sys.argv[:1]
        try:
            run = self._state.run = _module().init(**self._arguments(config))
        # What its service raises shares no base with wandb's own errors.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"tracker=wandb: {reason}; or set trackers.wandb.mode=offline") from error
        finally:
            sys.argv = argv
        (Path(config.run_dir) / ID_FILE).write_text(run.id, encoding="utf-8")
        # A resumed run reports steps again, and wandb's own counter never goes back.
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        where = run.url if self._mode == "online" else f"offline · wandb sync {Path(run.dir).parent}"
        Console().print(f"wandb     {where}\n", highlight=False, soft_wrap=True, markup=False)

    @hookimpl
    def after_step(self, report: StepReport) -> None:
        """Log a logging point."""
        values = dataclasses.asdict(report)
        self._log(values.pop("step"), "train", values.pop("metrics") | values)

    @hookimpl
    def after_evaluation(self, report: EvaluationReport) -> None:
        """Log held-out quality and a table of answers; an evaluation by itself ends the run."""
        values = _quality(report)
        answers = report.samples[: self.samples]
        if answers and self._state.run is not None:
            rows = [list(dataclasses.asdict(answer).values()) for answer in answers]
            values["answers"] = _module().Table(columns=list(dataclasses.asdict(answers[0])), data=rows)
        self._log(report.step, "held_out", values)
        if "adapter" not in (self._state.config or {"adapter"}):
            self._finish(0, _quality(report))

    @hookimpl
    def after_train(self, result: TrainResult) -> None:
        """Write the summary and end the run."""
        values = dataclasses.asdict(result).items()
        summary = {name: value for name, value in values if isinstance(value, int | float)}
        self._finish(0, summary | _quality(result.before, "before_") | _quality(result.after, "after_"))

    @hookimpl
    def on_train_error(self, error: BaseException) -> None:
        """End the run as crashed, or as killed; what wandb meets then must not hide `error`."""
        with contextlib.suppress(Exception):
            self._finish(255 if isinstance(error, KeyboardInterrupt) else 1, {})

    @property
    def _mode(self) -> str:
        return self.mode or os.environ.get("WANDB_MODE") or "online"

    def _arguments(self, config: DictConfig) -> dict[str, Any]:
        file = Path(config.run_dir) / ID_FILE
        known = file.read_text(encoding="utf-8").strip() if file.exists() else None
        return {
            "project": self.project or os.environ.get("WANDB_PROJECT") or "luthier",
            "name": self.run_name or file.parent.name,
            "entity": self.entity,
            "mode": self._mode,
            "tags": list(self.tags),
            "dir": str(file.parent),
            "config": luthier.without_secrets(config),
            "id": known,
            # Offline it is the id alone that `wandb sync` goes by.
            "resume": "allow" if known and self._mode == "online" else None,
            # Two runs of one process, or a person's own one beside, are different runs.
            "reinit": "create_new",
            "settings": _module().Settings(silent=True, console="off", save_code=False),
        }

    def _log(self, step: int, group: str, values: dict[str, Any]) -> None:
        if self._state.run is not None:
            self._state.run.log({"step": step, **{f"{group}/{name}": v for name, v in values.items()}})

    def _finish(self, exit_code: int, summary: dict[str, Any]) -> None:
        run, self._state.run = self._state.run, None
        if run is not None:
            run.summary.update(summary)
            run.finish(exit_code=exit_code)


def _module() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("tracker=wandb: wandb is not installed; pip install wandb") from error
    return wandb


def _quality(report: EvaluationReport | None, prefix: str = "") -> dict[str, Any]:
    names = ("loss", "perplexity", "accuracy") if report else ()
    values = {f"{prefix}{name}": getattr(report, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


@hookimpl
def register_trackers(register: Register) -> None:
    """Register `wandb`."""
    register("wandb", WandB)
