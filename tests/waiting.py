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

    def work() -> None:
        time.sleep(5)
        (folder / "worked").write_text(str(processes.rank))

    for _ in range(2):
        (folder / "worked").unlink(missing_ok=True)
        processes.gather(None)
        processes.after_main(work)
        (folder / f"saw{processes.rank}").write_text((folder / "worked").read_text())
        processes.gather(None)
