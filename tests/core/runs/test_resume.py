"""Going on: bit by bit the run that was never stopped, and never another run by mistake."""

import itertools
import json
import logging
import os
import re
import signal
import time
from pathlib import Path

import pytest

from forked import Command, luthier
from helpers import crash, save_tiny, write_rows
from luthier import ConfigError, compose, train
from luthier.runs import resume
from luthier.runs.folder import write_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("resumed")
    save_tiny(path / "base")
    rows = [
        {"prompt": f"{a}{b} ->", "completion": f" {b}{a}"} for a, b in itertools.product("abcdef", "ghij")
    ]
    write_rows(path / "rows.jsonl", rows)
    (path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::5]))
    return path


def overrides(folder, run_dir, *more):
    return [
        f"model.path={folder}/base", "model.dtype=float32", "data=jsonl", f"data.path={folder}/rows.jsonl",
        "batch_size=5", "optimiser.lr=1e-2", "max_steps=12", "checkpoint.every=4", f"run_dir={run_dir}",
        "tracker=[]", *more,
    ]  # fmt: skip


def weights(result) -> bytes:
    (file,) = result.model_dir.glob("*.safetensors")
    return file.read_bytes()


# Three matrices or so have a new basis at every step, that of the crash included.
GALORE = ["optimiser=galore", "optimiser.rank=8", "optimiser.refresh_every=5"]


@pytest.mark.parametrize(
    "method",
    [
        ["adapter=lora", "adapter.dropout=0.2"],
        ["adapter=lora", "adapter.init=pissa"],
        ["adapter=full"],
        ["adapter=full", "shuffle=false"],
        ["adapter=lora", "model.dtype=bfloat16", "model.gradient_checkpointing=true"],
        ["adapter=full", "model.dtype=bfloat16"],
        ["adapter=full", *GALORE],
        ["adapter=full", *GALORE, "optimiser.layerwise=true", "max_grad_norm=null", "pack_tokens=32"],
    ],
    ids=["lora", "pissa", "full", "in_order", "lora_bf16", "full_bf16", "galore", "galore_layerwise"],
)
def test_a_crashed_run_goes_on_to_the_same_bits(folder, tmp_path, method):
    # users.md rows 22 and 25: a run that cannot be resumed, or gives other results when it is.
    whole = train(compose("train", overrides(folder, tmp_path / "whole", *method)))
    # Step 10 is past the checkpoint of step 8, in the middle of the third epoch.
    crash(overrides(folder, tmp_path / "run", *method), 10)
    result = train(compose("train", [f"resume={tmp_path}/run"]))
    assert weights(result) == weights(whole)
    assert (result.first_loss, result.last_loss, result.tokens) == (
        whole.first_loss, whole.last_loss, whole.tokens,
    )  # fmt: skip


def test_auto_starts_goes_on_and_knows_when_it_is_done(folder, tmp_path, caplog):
    arguments = overrides(folder, tmp_path / "run", "resume=auto")
    crash(arguments, 5)
    result = train(compose("train", arguments))
    whole = train(compose("train", overrides(folder, tmp_path / "whole")))
    assert weights(result) == weights(whole)
    with caplog.at_level(logging.WARNING, "luthier"):
        again = train(compose("train", arguments))
    assert "is complete: all 12 steps are done" in caplog.text
    assert again == result


def test_a_run_killed_before_its_first_checkpoint_starts_anew(folder, tmp_path):
    arguments = overrides(folder, tmp_path / "run", "resume=auto", "checkpoint.every=100")
    crash(arguments, 5)
    assert train(compose("train", arguments)).steps == 12


def test_a_damaged_checkpoint_costs_only_its_steps(folder, tmp_path, caplog):
    crash(overrides(folder, tmp_path / "run"), 10)
    file = tmp_path / "run/checkpoints/step-00000008/weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING, "luthier"):
        result = train(compose("train", [f"resume={tmp_path}/run"]))
    assert re.search(r"step-00000008 is damaged \(weights.safetensors is not what was written", caplog.text)
    assert weights(result) == weights(train(compose("train", overrides(folder, tmp_path / "whole"))))


def test_a_changed_config_says_what_changed_and_harms_nothing(folder, tmp_path):
    run = tmp_path / "run"
    crash(overrides(folder, run), 10)
    before = (run / "config.yaml").read_text()
    with pytest.raises(
        ConfigError, match=r"config changed since .*: batch_size: 5 → 4; optimiser.lr: 0.01 → 0.5"
    ):
        train(compose("train", overrides(folder, run, "resume=auto", "batch_size=4", "optimiser.lr=0.5")))
    assert (run / "config.yaml").read_text() == before
    with pytest.raises(ConfigError, match=r"adapter.rank=3: resume=.* only .* may change"):
        compose("train", [f"resume={run}", "adapter.rank=3"])
    assert train(compose("train", [f"resume={run}", "log_every=2", "pack_tokens=64"])).steps == 12


def test_a_changed_row_is_named(folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    lines = (folder / "rows.jsonl").read_text().splitlines()
    data.write_text("\n".join(lines))
    crash(overrides(folder, tmp_path / "run", f"data.path={data}"), 10)
    lines[6] = json.dumps({"prompt": "other", "completion": "row"})
    data.write_text("\n".join([*lines, lines[0]]))
    with pytest.raises(
        ConfigError, match=r"24 rows then, 25 now; the first that differs is row 7 \(.*rows.jsonl:7\)"
    ):
        train(compose("train", [f"resume={tmp_path}/run"]))


def test_changed_versions_are_told(folder, tmp_path, caplog, monkeypatch):
    crash(overrides(folder, tmp_path / "run"), 10)
    monkeypatch.setattr(resume, "versions", lambda: {"torch": "9.9"})
    with caplog.at_level(logging.WARNING, "luthier"):
        train(compose("train", [f"resume={tmp_path}/run"]))
    assert re.search(r"versions changed since the checkpoint.*torch \S+ → 9.9", caplog.text)


def test_a_run_may_go_on_for_longer(folder, tmp_path, caplog):
    first = train(compose("train", overrides(folder, tmp_path / "run")))
    with caplog.at_level(logging.WARNING, "luthier"):
        longer = train(compose("train", [f"resume={tmp_path}/run", "max_steps=20"]))
    assert (longer.steps, longer.first_loss) == (20, first.first_loss)
    assert "max_steps: 12 → 20: the schedule follows the new length" in caplog.text
    assert "max_steps: 20" in (tmp_path / "run/config.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["resume=nowhere"], r"resume=nowhere: there is no run; expected a run folder with config.yaml"),
        (["resume=auto", "run_dir=runs/${now:%Y}"], r"resume=auto needs a folder that stays the same"),
        (["checkpoint.keep=0"], r"checkpoint.keep=0 must be at least 1"),
        (["evaluation.patience=2"], r"evaluation.patience needs evaluations while training"),
    ],
)
def test_what_cannot_be_meant_is_refused(folder, tmp_path, arguments, told):
    with pytest.raises(ConfigError, match=told):
        compose(
            "train",
            [*([] if "resume=nowhere" in arguments else overrides(folder, tmp_path / "r")), *arguments],
        )


def test_the_best_weights_are_kept_and_the_run_stops_early(folder, tmp_path):
    more = ["data@eval_data=jsonl", f"eval_data.path={folder}/held.jsonl", "evaluation.generate=false"]
    often = [*more, "evaluation.every=1", "optimiser.lr=0.3", "max_steps=40", "schedule.name=constant"]
    result = train(compose("train", overrides(
        folder, tmp_path / "run", *often, "evaluation.patience=3", "evaluation.restore_best=true",
    )))  # fmt: skip
    best = result.restored_step
    assert result.steps == best + 3 < 40
    until = train(compose("train", overrides(folder, tmp_path / "short", *often, f"max_steps={best}")))
    assert weights(result) == weights(until)
    assert result.after.loss == until.after.loss


def command(folder, run_dir, *more):
    return ["train", *overrides(folder, run_dir, *more)]


def started(arguments: list[str], run_dir: Path) -> Command:
    """Start a run and wait for its first checkpoint."""
    process = Command(arguments)
    patience = time.monotonic() + 120
    while not (run_dir / "checkpoints" / "step-00000004").exists():
        assert time.monotonic() < patience
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return process


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_signal_saves_and_says_how_to_go_on(folder, tmp_path, number, name):
    run = tmp_path / "run"
    steps = ["max_steps=100000", "checkpoint.every=4", "log_every=100000"]
    process = started(command(folder, run, *steps), run)
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    told = re.fullmatch(
        r"the run stops after this step and saves a checkpoint; .*\n"
        rf"luthier: stopped by {name} after step (\d+); a checkpoint is saved, .*resume=(.*)\n",
        said,
    )
    assert told, said
    assert (run / "checkpoints" / f"step-{int(told[1]):08d}").is_dir()
    assert Path(told[2]) == run


def test_a_killed_process_goes_on_to_the_same_bits(folder, tmp_path):
    run = tmp_path / "run"
    arguments = command(folder, run, "max_steps=150", "resume=auto")
    process = started(arguments, run)
    process.kill()
    process.communicate()
    assert not (run / "model").exists()
    assert luthier(*arguments).returncode == 0
    whole = train(compose("train", overrides(folder, tmp_path / "whole", "max_steps=150")))
    assert (run / "model/adapter_model.safetensors").read_bytes() == weights(whole)


def test_a_multirun_cannot_resume_one_run(folder, tmp_path):
    said = luthier("train", "-m", f"resume={tmp_path}")
    assert said.returncode == 2
    assert "-m starts new runs one after the other and cannot be combined with resume=FOLDER" in said.stderr


def held_out(folder, *more):
    return ["data@eval_data=jsonl", f"eval_data.path={folder}/held.jsonl", "evaluation.generate=false", *more]


def test_the_last_weights_may_be_the_best(folder, tmp_path):
    # The loss falls to the end, so restoring an earlier evaluation would throw the last steps away.
    more = held_out(folder, "evaluation.every=5", "evaluation.restore_best=true", "tracker=[metrics]")
    arguments = overrides(folder, tmp_path / "run", *more)
    arguments.remove("tracker=[]")
    result = train(compose("train", arguments))
    lines = [json.loads(line) for line in (tmp_path / "run/evaluations.jsonl").read_text().splitlines()]
    told = {line["step"]: line["loss"] for line in lines}
    assert told[12] < min(told[5], told[10])
    assert result.restored_step is None
    assert (result.after.step, result.after.loss) == (12, told[12])
    plain = train(compose("train", overrides(folder, tmp_path / "plain", *held_out(folder))))
    assert weights(result) == weights(plain)


def test_a_run_that_patience_ended_is_complete(folder, tmp_path, caplog):
    more = held_out(folder, "evaluation.every=1", "evaluation.patience=3", "optimiser.lr=0.3", "resume=auto")
    arguments = overrides(folder, tmp_path / "run", *more, "max_steps=40", "schedule.name=constant")
    first = train(compose("train", arguments))
    made = (first.model_dir / "adapter_model.safetensors").stat().st_mtime_ns
    with caplog.at_level(logging.WARNING, "luthier"):
        again = train(compose("train", arguments))
    assert f"is complete: all {first.steps} steps are done" in caplog.text
    assert again == first
    assert (first.model_dir / "adapter_model.safetensors").stat().st_mtime_ns == made
    # More patience is more training.
    assert train(compose("train", [*arguments, "evaluation.patience=5"])).steps > first.steps


def test_a_result_without_checkpoints_is_never_trained_over(folder, tmp_path, caplog):
    arguments = overrides(folder, tmp_path / "run", "resume=auto", "checkpoint.every=0")
    first = train(compose("train", arguments))
    kept = weights(first)
    with caplog.at_level(logging.WARNING, "luthier"):
        assert train(compose("train", arguments)) == first
    assert "is complete" in caplog.text
    with pytest.raises(ConfigError, match=r"config changed since .*run: seed: 0 → 5"):
        train(compose("train", [*arguments, "seed=5"]))
    with pytest.raises(ConfigError, match=r"run holds no whole checkpoint to go on from"):
        train(compose("train", [*arguments, "max_steps=20"]))
    assert weights(first) == kept


def test_no_whole_checkpoint_is_no_reason_to_start_anew(folder, tmp_path):
    # users.md row 25: a resume flag that starts from nothing.
    run = tmp_path / "run"
    crash(overrides(folder, run), 10)
    for file in run.glob("checkpoints/*/weights.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"run holds no whole checkpoint to go on from"):
        train(compose("train", [f"resume={run}"]))
    assert len(list(run.glob("checkpoints/step-*"))) == 2


@pytest.mark.parametrize("at", ["checkpoint.every=100", "checkpoint.every=4"])
def test_no_step_is_told_twice(folder, tmp_path, at):
    arguments = overrides(folder, tmp_path / "run", "resume=auto", at, "log_every=1", *held_out(folder))
    arguments[arguments.index("tracker=[]")] = "tracker=[metrics]"
    crash(arguments, 5)
    train(compose("train", arguments))

    def steps(name):
        return [json.loads(line)["step"] for line in (tmp_path / "run" / name).read_text().splitlines()]

    assert steps("metrics.jsonl") == list(range(1, 13))
    assert steps("evaluations.jsonl") == [0, 12]


def test_fewer_steps_than_are_done_are_refused(folder, tmp_path):
    crash(overrides(folder, tmp_path / "run"), 10)
    with pytest.raises(ConfigError, match=r"run has 8 steps behind it; max_steps or epochs ask for 6"):
        train(compose("train", [f"resume={tmp_path}/run", "max_steps=6"]))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"base_model: llama\n", r"config.yaml is not that of a training run: adapter, .* missing"),
        (
            b"a: [b\n",
            r"config.yaml cannot be read as a run's config: .*; each of its checkpoints holds a copy",
        ),
        (b"\xff\xfe\x00", r"config.yaml cannot be read as a run's config"),
        (b"", r"config.yaml is not that of a training run: adapter, .* missing"),
        (b"just text", r"config.yaml is not that of a training run"),
        (b"batch_size: many\n", r"config.yaml cannot be read as a run's config: .*many"),
    ],
)
def test_another_folder_is_told_in_one_line(tmp_path, text, told):
    (tmp_path / "config.yaml").write_bytes(text)
    with pytest.raises(ConfigError, match=told):
        train(compose("train", [f"resume={tmp_path}"]))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("checkpoint.evry=3", r"checkpoint.evry"),
        ("checkpoint.every=abc", r"checkpoint.every"),
        ("checkpoint=3", r"checkpoint"),
        ("evaluation=null", r"evaluation"),
        ("~trackers", r"trackers"),
        ("max_steps=1.5", r"max_steps"),
        ("plugins.required=3", r"plugins.required"),
        ("checkpoint.every=1,2", r"checkpoint.every"),
        ("x", r"'x' is no override"),
    ],
)
def test_a_wrong_option_of_a_resumed_run_is_named(folder, tmp_path, override, told):
    (tmp_path / "run").mkdir()
    config = compose("train", overrides(folder, tmp_path / "run"))
    write_config(config, tmp_path / "run")
    with pytest.raises(ConfigError, match=told):
        compose("train", [f"resume={tmp_path}/run", override])


def test_two_runs_cannot_share_a_folder(folder, tmp_path):
    run = tmp_path / "run"
    process = started(command(folder, run, "max_steps=100000"), run)
    try:
        for arguments in ([f"resume={run}"], overrides(folder, run, "resume=auto", "max_steps=100000")):
            with pytest.raises(ConfigError, match=r"run is in use by a run that has not ended"):
                train(compose("train", arguments))
    finally:
        process.kill()
        process.communicate()
    steps = 1 + max(int(one.name.removeprefix("step-")) for one in run.glob("checkpoints/step-*"))
    assert train(compose("train", [f"resume={run}", f"max_steps={steps}"])).steps == steps


def test_a_file_that_cannot_be_written_is_one_line_when_resumed_too(folder, tmp_path):
    arguments = overrides(folder, tmp_path / "run")
    arguments[arguments.index("tracker=[]")] = "tracker=[metrics]"
    crash(arguments, 5)
    (tmp_path / "run/metrics.jsonl").unlink()
    (tmp_path / "run/metrics.jsonl").mkdir()
    said = luthier("train", f"resume={tmp_path}/run")
    assert (said.returncode, said.stderr.count("\n")) == (2, 1), said.stderr
    assert "run/metrics.jsonl: Is a directory" in said.stderr
