"""Commands killed at any operation on files, and short of disk: repeated, they end in the same bits.

Nothing is left over, and nothing half written is taken for a result.
"""

import gc
import itertools
import json
import shutil
import signal
from functools import partial, partialmethod

import pytest
from safetensors.torch import load_file
from transformers import PreTrainedModel

from helpers import save_tiny, write_rows
from killing import Operations, forked
from luthier import compose, train
from luthier_plugins.commands.fold import fold
from luthier_plugins.commands.merge import merge
from luthier_plugins.commands.sample import sample, sampling

pytestmark = pytest.mark.slow
KILLS = 40
"""Kills of a command, at the least."""
AT_THE_END = 10
"""Those among the last operations on the result, while it is written."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("killed")
    save_tiny(path / "base")
    pairs = [f"{a}{b}" for a, b in itertools.product("abc", "def")]
    write_rows(path / "rows.jsonl", [{"prompt": f"{p} ->", "completion": f" {p[::-1]}"} for p in pairs])
    write_rows(path / "asked.jsonl", [{"prompt": f"{p} ->"} for p in (*pairs, "ag", "bg", "cg")])
    write_rows(path / "held.jsonl", [{"prompt": "x ->", "completion": " y"}])
    preferences = [{"prompt": f"{p} ->", "chosen": f" {p[::-1]}", "rejected": f" {p}"} for p in pairs]
    write_rows(path / "pairs.jsonl", preferences)
    for name, more in {
        "adapter": ["seed=1"],
        "full": ["adapter=full"],
        "other": ["adapter=full", "seed=1"],
    }.items():
        train(compose("train", sft(path, path / name, *more)))
    gc.freeze()  # pages that a fork need not copy
    return path


def run_options(folder, out, *more):
    return [f"model.path={folder}/base", "model.dtype=float32", "batch_size=4", "optimiser.lr=1e-2",
            "max_steps=2", "checkpoint.every=1", "tracker=[metrics]", "log_every=1", f"run_dir={out}",
            "resume=auto", *more]  # fmt: skip


def sft(folder, out, *more):
    return run_options(folder, out, "data=jsonl", f"data.path={folder}/rows.jsonl", *more)


HELD_OUT = ["data@eval_data=jsonl", "eval_data.path={folder}/held.jsonl", "evaluation.generate=false",
            "evaluation.every=1"]  # fmt: skip


@pytest.fixture
def small_parts(monkeypatch):
    """Write answers batch by batch, and models in many shards: enough operations for all kills."""
    whole = PreTrainedModel.save_pretrained
    monkeypatch.setattr(sampling, "TOGETHER", 1)
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", partialmethod(whole, max_shard_size="4KB"))


def lora(folder):
    return sft(folder, "OUT", *(word.format(folder=folder) for word in HELD_OUT))


def full(folder):
    return sft(folder, "OUT", "adapter=full")


def dpo(folder):
    return run_options(folder, "OUT", "objective=dpo", "data=jsonl", f"data.path={folder}/pairs.jsonl")


def ppo(folder):
    data = ["objective=ppo", "data=jsonl", f"data.path={folder}/rows.jsonl", "reward_model=[length]"]
    small = ["objective.max_new_tokens=3", "objective.rollout_batch_size=4"]
    return run_options(folder, "OUT", *data, *small)


def merged(folder):
    models = f"models=[{folder}/full,{folder}/other]"
    return [models, "merger=soup", "shard_gb=1e-7", "run_dir=OUT", "resume=auto"]


def sampled(folder):
    data = ["data=jsonl", f"data.path={folder}/asked.jsonl", "reward_model=[length]", "n=2", "batch_size=2"]
    more = ["max_new_tokens=3", "out=OUT/answers.jsonl", "write=candidates", "selector=best_of_n"]
    return [f"model.path={folder}/base", "model.dtype=float32", *data, *more]


def folded(folder):
    return [f"model.path={folder}/adapter/model", "dtype=float32", "out=OUT/folded"]


COMMANDS = {
    lora: (train, "run_dir", "model."), full: (train, "run_dir", "model."), dpo: (train, "run_dir", "model."),
    ppo: (train, "run_dir", "model."), merged: (merge, "run_dir", "/merging"),
    sampled: (sample, "out", "answers.jsonl"), folded: (fold, "out", ".folded."),
}  # fmt: skip
"""Of each what runs it, the option that says where to, and what the paths hold that become its result."""


def composed(overrides, folder):
    """Return what does the command in a folder: composed once, as that takes as long as the command."""
    run, key, _ = COMMANDS[overrides]
    config = compose(run.__name__, overrides(folder))

    def command(out):
        config[key] = config[key].replace("OUT", str(out))
        run(config)

    return command


def contents(out):
    """Return every file's bytes; of records with times in them, what has none."""
    return {
        str(path.relative_to(out)): _timeless(path, out) for path in sorted(out.rglob("*")) if path.is_file()
    }


def _timeless(path, out):
    if path.is_dir():
        return "folder"
    if path.name in ("metrics.jsonl", "evaluations.jsonl"):
        return [json.loads(line)["step"] for line in path.read_text().splitlines()]
    if path.parent.name == "rollouts":
        return (
            [tensor.tolist() for _, tensor in sorted(load_file(path).items())]
            if path.suffix != ".jsonl"
            else True
        )
    if path.suffix == ".safetensors":
        return path.read_bytes()
    text = path.read_text().replace(str(out), "OUT")
    if path.name in ("summary.json", "merge.json", "state.json", "manifest.json", "README.md"):
        return len(json.loads(text)) if path.suffix == ".json" else True
    return text


def deadly(operations, result):
    """Return the places to be killed at: evenly among all operations, and at the last on the result."""
    writing = [place for place, line in enumerate(operations, 1) if result in line]
    late = writing[-AT_THE_END:]
    others = [place for place in range(1, len(operations) + 1) if place not in late]
    assert len(late) == AT_THE_END, writing
    places = sorted({*others[:: max(1, len(others) // (KILLS - AT_THE_END))], *late, len(operations)})
    assert len(places) >= KILLS, operations
    return places


@pytest.mark.parametrize("overrides", COMMANDS, ids=lambda overrides: overrides.__name__)
def test_e_a_command_killed_anywhere_and_repeated_ends_in_the_same_bits(
    folder, tmp_path, small_parts, overrides
):
    command, log = composed(overrides, folder), tmp_path / "operations"
    whole = tmp_path / "whole"
    assert forked((lambda: command(whole), Operations(whole, log=log))) == [(0, "")]
    operations = log.read_text().splitlines()
    expected, killed = contents(whole), 0
    everywhere = deadly(operations, COMMANDS[overrides][2])
    for places in (everywhere[first : first + 2] for first in range(0, len(everywhere), 2)):
        outs = {place: tmp_path / f"killed{place}" for place in places}
        once = [(partial(command, out), Operations(out, deadly=place)) for place, out in outs.items()]
        assert {status for status, _ in forked(*once)} == {-signal.SIGKILL}, places
        again = forked(*((partial(command, out), None) for out in outs.values()))
        for (place, out), (status, said) in zip(outs.items(), again, strict=True):
            where = f"killed before {operations[place - 1]}"
            whole_already = overrides in (sampled, folded) and "there" in said
            assert status == 0 or whole_already, (where, said)
            assert contents(out) == expected, where
            shutil.rmtree(out)
            killed += 1
    assert killed >= KILLS
