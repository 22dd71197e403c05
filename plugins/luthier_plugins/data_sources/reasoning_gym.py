"""Procedurally generated problems with verifiers, from the package reasoning-gym."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from luthier import ConfigError, DataSource, Register, Row, hookimpl, option, spoken, unknown

HELD_OUT = 1_000_003
"""Added to the seed of the held-out split, so that it is another draw of the same problems."""


@dataclass(frozen=True)
class ReasoningGym(DataSource):
    """Problems of one reasoning-gym task, as chat messages, with the task's own verifier.

    ``split=held_out`` draws with another seed; a problem that both splits drew is not trained on.
    """

    source: ClassVar[str] = "Stojanovski et al. 2025, arXiv 2505.24760"

    task: str = option("???", "Name of the task, e.g. chain_sum or gsm_symbolic.")
    size: int = option(1600, "Problems to draw.")
    seed: int = option(0, "Seed of the draw.")
    split: Literal["train", "held_out"] = option("train", "Which draw: train, or held_out by another seed.")
    system: str | None = option(None, "System message; null: the chat template's own.")
    chat: bool = option(True, "Pose problems as chat messages; false: as plain text.")
    options: Mapping[str, Any] = option({}, "The task's own options, e.g. {max_terms: 3}.")

    def rows(self) -> Iterator[Row]:
        """Yield ``prompt``, ``completion`` and the problem's ``entry``.

        Raises:
            ConfigError: The package or the task is missing, or an option is not the task's.
        """
        for index, entry in enumerate(self._dataset):
            question, answer = str(entry["question"]), str(entry["answer"])
            fields: dict[str, Any] = {"prompt": question, "completion": answer}
            if self.chat:
                system = [{"role": "system", "content": self.system}] if self.system is not None else []
                prompt = [*system, {"role": "user", "content": question}]
                fields = {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}
            yield Row({**fields, "entry": entry}, f"{self.task}[{index}]")

    def verify(self, row: Row, answer: str) -> float | None:
        """Score with the task's verifier: 1.0 for the right answer, less or nothing for others."""
        return float(self._dataset.score_answer(spoken(answer), row.fields["entry"]))

    @functools.cached_property
    def _dataset(self) -> Any:
        try:
            import reasoning_gym
        except ImportError as error:
            raise ConfigError("needs the package reasoning-gym: pip install 'luthier[demo]'") from error
        from reasoning_gym.factory import DATASETS

        if self.task not in DATASETS:
            raise ConfigError(f"task: {unknown('task', self.task, DATASETS)}")
        seed = self.seed + HELD_OUT * (self.split == "held_out")
        try:
            return reasoning_gym.create_dataset(self.task, size=self.size, seed=seed, **self.options)
        except (TypeError, AssertionError, ValueError) as error:
            raise ConfigError(
                f"task {self.task} refuses its options {dict(self.options)}: {error}"
            ) from error


@hookimpl
def register_data_sources(register: Register) -> None:
    """Register `reasoning_gym`."""
    register("reasoning_gym", ReasoningGym)
