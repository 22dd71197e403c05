"""A process of two, of which the main one is busy for longer than a collective would wait."""

import datetime
import sys
import time
from pathlib import Path

import torch

from luthier.system import Processes


def main() -> None:
    """Write what each process saw to the folder that is given."""
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=2))
    processes = Processes.launched()
    folder = Path(sys.argv[1])

    processes.gather(None)
    for turn in range(2):
        done = folder / f"done{turn}"

        def work(done: Path = done) -> None:
            time.sleep(4)
            done.write_text(str(processes.rank))

        processes.after_main(work)
        (folder / f"saw{turn}{processes.rank}").write_text(done.read_text())
    # The main process has nothing left to do, and must not end before the others have looked.
