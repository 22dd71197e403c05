"""Luthier in one process and in two, each a process of its own."""

import json
import os
import subprocess
import sys

ACCELERATE = [
    sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_machines=1",
    "--num_processes=2", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0",
]  # fmt: skip
LAUNCH = {
    "one": [sys.executable],
    "ddp": [*ACCELERATE, "--multi_gpu"],
    "fsdp2": [*ACCELERATE, "--use_fsdp", "--fsdp_version=2"],
}


def launched(way, *arguments, fails=False):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*LAUNCH[way], *arguments], capture_output=True, text=True, env=environment, timeout=120
    )
    assert (done.returncode != 0) == fails, done.stderr
    return done


def trained(way, run_dir, *overrides):
    """Run `luthier train` to `run_dir`, unless it resumes there, and return its summary."""
    module = "-m" if way == "one" else "--module"
    new = [] if any(one.startswith("resume=") for one in overrides) else [f"run_dir={run_dir}"]
    launched(way, module, "luthier", "train", *overrides, *new)
    return json.loads((run_dir / "summary.json").read_text())
