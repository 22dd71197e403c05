"""What lies on disk: run folder, checkpoints, state, resume, reports."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier.runs.checkpoint import Checkpoint as Checkpoint, Checkpoints as Checkpoints
    from luthier.runs.folder import (
        SUMMARY as SUMMARY,
        claimed as claimed,
        finished as finished,
        hooks as hooks,
        remove_leftovers as remove_leftovers,
        run_folder as run_folder,
        write_config as write_config,
        writing as writing,
    )
    from luthier.runs.job import STATUS as STATUS, job_status as job_status, write_status as write_status
    from luthier.runs.options import CheckpointConfig as CheckpointConfig, PluginsConfig as PluginsConfig
    from luthier.runs.report import (
        EvaluationReport as EvaluationReport,
        Sample as Sample,
        StepReport as StepReport,
        TrainResult as TrainResult,
        as_json as as_json,
        evaluation_of as evaluation_of,
        versions as versions,
        write_json as write_json,
    )
    from luthier.runs.resume import (
        LONGER as LONGER,
        check_config as check_config,
        check_lock as check_lock,
        check_rows as check_rows,
        completed as completed,
        lock_of as lock_of,
        resumed_config as resumed_config,
        resumed_run as resumed_run,
    )
    from luthier.runs.run_header import (
        header as header,
        model_line as model_line,
        parameter_counts as parameter_counts,
    )
    from luthier.runs.signals import StoppedError as StoppedError, caught as caught, supervised as supervised
    from luthier.runs.state import (
        Snapshot as Snapshot,
        TrainingState as TrainingState,
        seed_everything as seed_everything,
    )
else:
    __getattr__, __dir__, __all__ = attach(__name__)
