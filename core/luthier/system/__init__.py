"""The machine: files and locks, devices and precision, memory, processes."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier.system.files import (
        locked as locked,
        read_table as read_table,
        sha256_of as sha256_of,
        written_whole as written_whole,
    )
    from luthier.system.memory import Watch as Watch, in_use as in_use, peak_memory_mb as peak_memory_mb
    from luthier.system.precision import (
        DTYPES as DTYPES,
        pick_device as pick_device,
        pick_dtype as pick_dtype,
        settle as settle,
        weights_and_autocast as weights_and_autocast,
    )
    from luthier.system.processes import (
        Processes as Processes,
        like_parameter as like_parameter,
        local_tensor as local_tensor,
        whole_tensor as whole_tensor,
    )
else:
    __getattr__, __dir__, __all__ = attach(__name__)
