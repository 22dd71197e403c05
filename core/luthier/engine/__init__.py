"""The training loop, its monitors, schedules and auxiliary losses."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier.engine.auxiliary import objective_of as objective_of
    from luthier.engine.loop import Loop as Loop
    from luthier.engine.monitors import Monitor as Monitor
    from luthier.engine.options import ScheduleConfig as ScheduleConfig
    from luthier.engine.pooling import pooled as pooled
    from luthier.engine.progress import Plan as Plan, Progress as Progress
    from luthier.engine.schedules import schedule as schedule
    from luthier.engine.training_run import TrainingRun as TrainingRun
    from luthier.engine.wrapped import Watched as Watched
else:
    __getattr__, __dir__, __all__ = attach(__name__)
