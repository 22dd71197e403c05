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

import luthier
from luthier import EvaluationReport, Register, StepReport, Tracker, TrainResult, hookimpl, option
from luthier_plugins.trackers.wandb.client import client, name_and_group
from luthier_plugins.trackers.wandb.redaction import without_secrets
from luthier_toolkits.terminal import SafeConsole

ID_FILE = "wandb_id.txt"


@dataclass
class _State:
    mode: str = "disabled"
    config: DictConfig | None = None
    run: Any = None


@dataclass(frozen=True)
class WandB(Tracker):
    """A run on Weights & Biases; a resumed run goes on under the id it had."""

    source: ClassVar[str] = "https://docs.wandb.ai/ref/python"

    project: str | None = option(None, "The project; null: $WANDB_PROJECT, or luthier.")
    run_name: str | None = option(
        None, "Name of the run; null: the run folder's, in a multirun with that of the sweep, its group."
    )
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
        self._state.mode = self.mode or os.environ.get("WANDB_MODE") or "online"
        wandb: Any = None if self._state.mode == "disabled" else client()
        if self._state.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise luthier.ConfigError("tracker=wandb: nobody is logged in; run `wandb login`, or set "
                              "trackers.wandb.mode=offline and `wandb sync` later")  # fmt: skip
        self._state.config = config if wandb else None

    @hookimpl
    def after_header(self) -> None:
        """Open the run: model and data are sound, and the first evaluation follows."""
        if (config := self._state.config) is None:
            return
        # wandb records the command line, where a secret may stand; the config says the same.
        argv, sys.argv = sys.argv, sys.argv[:1]
        try:
            run = self._state.run = client().init(**self._arguments(config))
        except Exception as error:  # what its service raises shares no base with wandb's own errors
            message = f"tracker=wandb: {' '.join(str(error).split())}; or set trackers.wandb.mode=offline"
            raise luthier.ConfigError(message) from error
        finally:
            sys.argv = argv
        (Path(config.run_dir) / ID_FILE).write_text(run.id, encoding="utf-8")
        # A resumed run reports steps again, and wandb's own counter never goes back.
        run.define_metric("*", step_metric="step")
        where = run.url if self._state.mode == "online" else f"offline · wandb sync {Path(run.dir).parent}"
        SafeConsole().print(f"wandb     {where}\n", soft_wrap=True, markup=False)

    @hookimpl
    def after_step(self, report: StepReport) -> None:
        """Log a logging point."""
        values = dataclasses.asdict(report)
        self._log(values.pop("step"), "train", values.pop("metrics") | values)

    @hookimpl
    def after_evaluation(self, report: EvaluationReport) -> None:
        """Log held-out quality and a table of answers; an evaluation by itself ends the run."""
        values = _quality(report)
        answers = [dataclasses.asdict(sample) for sample in report.samples[: self.samples]]
        if answers and self._state.run is not None:
            rows = [list(answer.values()) for answer in answers]
            values["answers"] = client().Table(list(answers[0]), rows)
        self._log(report.step, "held_out", values)
        if self._state.config is not None and "adapter" not in self._state.config:
            self._finish(0, _quality(report))

    @hookimpl
    def after_train(self, result: TrainResult) -> None:
        """Write the summary and end the run."""
        summary = {k: v for k, v in dataclasses.asdict(result).items() if isinstance(v, int | float)}
        self._finish(0, summary | _quality(result.before, "before_") | _quality(result.after, "after_"))

    @hookimpl
    def on_train_error(self, error: BaseException) -> None:
        """End the run as crashed, or as killed; what wandb meets then must not hide `error`."""
        with contextlib.suppress(Exception):
            self._finish(255 if isinstance(error, KeyboardInterrupt) else 1, {})

    def _arguments(self, config: DictConfig) -> dict[str, Any]:
        file = Path(config.run_dir) / ID_FILE
        known = file.read_text(encoding="utf-8").strip() if file.exists() else None
        name, group = name_and_group(file.parent)
        return {
            "project": self.project or os.environ.get("WANDB_PROJECT") or "luthier",
            "name": self.run_name or name,
            "group": group,
            "entity": self.entity,
            "mode": self._state.mode,
            "tags": list(self.tags),
            "dir": str(file.parent),
            "config": without_secrets(config),
            "id": known,
            "resume": "allow" if known and self._state.mode == "online" else None,
            "reinit": "create_new",  # beside a run of the person's own, or another of this process
            "settings": client().Settings(silent=True, console="off", save_code=False),
        }

    def _log(self, step: int, group: str, values: dict[str, Any]) -> None:
        if self._state.run is not None:
            self._state.run.log({"step": step, **{f"{group}/{name}": v for name, v in values.items()}})

    def _finish(self, exit_code: int, summary: dict[str, Any]) -> None:
        if self._state.run is not None:
            self._state.run.summary.update(summary)
            self._state.run.finish(exit_code=exit_code)
        self._state.run = None


def _quality(report: EvaluationReport | None, prefix: str = "") -> dict[str, Any]:
    values = {name: getattr(report, name, None) for name in ("loss", "perplexity", "accuracy")}
    return {f"{prefix}{name}": value for name, value in values.items() if value is not None}


@hookimpl
def register_trackers(register: Register) -> None:
    """Register `wandb`."""
    register("wandb", WandB)
