"""Everything that a training run is made of, as its objective and the lifecycle hooks see it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from luthier.contracts import Adapter, Objective, Optimiser, Quantiser
from luthier.data import RowBatches, RunRows, Sampler, sampler_of
from luthier.models import LoadedModel
from luthier.policy import ModelPolicy
from luthier.system import Processes


@dataclass(frozen=True)
class TrainingRun:
    """A run whose model is prepared, before its first step.

    Attributes:
        loaded: The model, its adapter attached.
        policy: The same model as what objectives ask.
        rows: The rows to train on, and the held-out ones.
    """

    config: DictConfig
    run_dir: Path
    processes: Processes
    adapter: Adapter
    optimiser: Optimiser
    objective: Objective
    quantiser: Quantiser | None
    loaded: LoadedModel
    policy: ModelPolicy
    rows: RunRows

    def sampler(self, batch_size: int | None = None) -> Sampler:
        """Return the order in which the rows are seen, so many at a time; None: an optimiser step's."""
        return sampler_of(self.config, len(self.rows.data), batch_size)

    def row_batches(self) -> RowBatches:
        """Return the trees of the rows, in the sampler's order."""
        return RowBatches(self.rows.data.trees, self.sampler())
