"""Luthier in one process and in two, each a process of its own."""

import json
import os
import socket
import subprocess
import sys

from forked import Command

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
    """Run `luthier train` to `run_dir`, unless it resumes there, and return its summary.

    Two processes are given what the launcher gives them; `launched` asks the launcher itself.
    """
    new = [] if any(override.startswith("resume=") for override in overrides) else [f"run_dir={run_dir}"]
    run_forked(way, "train", *overrides, *new)
    return json.loads((run_dir / "summary.json").read_text())


def run_forked(way, *arguments, module="luthier.commands.cli", status=0):
    """Run a command of luthier, or another module's `main`, in one process or in two; return its errors."""
    environment = dict(os.environ)
    commands = [
        Command(arguments, env={**environment, **given}, module=module) for given in environments(way)
    ]
    ends = [command.communicate() for command in commands]
    errors = [err for _, err in ends]
    assert {command.returncode for command in commands} == {status}, errors
    return errors


def environments(way):
    """Return the variables of every process, those that `accelerate launch` sets."""
    if way == "one":
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO",
    }  # fmt: skip
    if way == "fsdp2":
        shared |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    return [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
