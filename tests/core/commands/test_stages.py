"""Earlier stages of a run: done in order, once, in processes of their own."""

import json
import shlex
import sys
from types import SimpleNamespace

import pytest

import forked
from helpers import save_tiny, write_rows
from luthier import ConfigError, LuthierError, compose, train
from luthier.commands.stages import _command, _done

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("staged")
    save_tiny(path / "base")
    write_rows(path / "rows.jsonl", [{"prompt": f"{a} then", "completion": a} for a in "abcd"])
    return path


def given(folder, run, *more):
    rows = f'data=jsonl "data.path={folder}/rows.jsonl"'
    stages = {
        "sft": f'train "model.path={folder}/base" max_steps=2 {rows} tracker=[] "run_dir=${{run_dir}}/sft"',
        "answers": f'sample "model.path=${{run_dir}}/sft" {rows} n=2 max_new_tokens=2 '
        '"out=${run_dir}/answers.jsonl"',
    }
    return compose("train", [
        "model.path=${run_dir}/sft", *shlex.split(rows), "tracker=[]", "max_steps=1", f"run_dir={run}",
        "resume=auto", *(f"stages.{name}='{line}'" for name, line in stages.items()), *more,
    ])  # fmt: skip


class Forked:
    """What stands for `subprocess.Popen` where a real interpreter's start is not what is tested."""

    def __init__(self, words, env):
        assert words[:4] == [sys.executable, "-P", "-m", "luthier"]
        self.command = forked.Command(words[4:], env=env)
        self.pid = self.command.pid

    def wait(self):
        out, err = self.command.communicate()
        sys.stdout.write(out)
        sys.stderr.write(err)
        return self.command.returncode


def test_stages_run_in_order_and_once(folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("luthier.commands.stages.subprocess", SimpleNamespace(Popen=Forked))
    run = tmp_path / "run"
    result = train(given(folder, run))
    assert json.loads((run / "sft/summary.json").read_text())["steps"] == 2
    assert len((run / "answers.jsonl").read_text().splitlines()) == 8
    assert result.steps == 1
    shown = capfd.readouterr().out
    assert shown.index("stage 1 of 2, sft: luthier train") < shown.index(
        "stage 2 of 2, answers: luthier sample"
    )
    made = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    again = train(given(folder, run))
    assert again.steps == 1
    assert made == {path: path.stat().st_mtime_ns for path in made}


def test_a_stage_that_fails_is_named_and_the_rest_is_not_run(folder, tmp_path, capfd):
    run = tmp_path / "run"
    line = f'train "model.path={folder}/nowhere" data=jsonl data.path=x "run_dir=${{run_dir}}/sft"'
    broken = f"stages.sft='{line}'"
    with pytest.raises(LuthierError, match=r"stages.sft ended with status 2"):
        train(given(folder, run, broken))
    assert "nowhere" in capfd.readouterr().err
    assert not (run / "answers.jsonl").exists()
    assert not (run / "config.yaml").exists()


def test_a_command_that_is_none_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"stages.sft: unknown command 'trian': did you mean 'train'"):
        train(given(folder, tmp_path / "run", "stages.sft='trian recipe=quickstart'"))


def test_e_finished_stages_of_every_command_are_repeatable(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("luthier.commands.stages.subprocess", SimpleNamespace(Popen=Forked))
    run, rows = tmp_path / "run", f'data=jsonl "data.path={folder}/rows.jsonl"'
    stages = {
        "sft": f'train "model.path={folder}/base" max_steps=1 {rows} tracker=[] "run_dir=${{run_dir}}/sft"',
        "fold": 'fold "${run_dir}/sft" "${run_dir}/folded"',
        "merge": 'merge "models={a: ${run_dir}/folded, b: ${run_dir}/folded}" merger=soup '
        "run_dir=${run_dir}/merged",
        "look": f'evaluate "${{run_dir}}/merged/model" {rows} tracker=[] evaluation.generate=false '
        '"run_dir=${run_dir}/look"',
    }
    words = [f"stages.{name}='{line}'" for name, line in stages.items()]
    config = compose("train", [
        "model.path=${run_dir}/merged/model", *shlex.split(rows), "tracker=[]", f"run_dir={run}",
        "resume=auto", "max_steps=1", *words,
    ])  # fmt: skip
    train(config)
    (run / "summary.json").unlink()  # as if it had been killed before its end
    assert train(config).steps == 1


@pytest.mark.parametrize("line", ["fold RUN out=OUT", "fold RUN 'out=OUT'", "fold RUN 'OUT'"])
def test_e_what_wrote_its_file_is_done_unless_its_leftovers_say_otherwise(tmp_path, line):
    out = tmp_path / ("a b" if "'" in line else "x")
    command = _command("f", line.replace("OUT", str(out)))
    assert not _done(command)
    out.mkdir()
    assert not _done(command), "an empty folder may be written to"
    (out / "model.safetensors").touch()
    assert _done(command)
    note = out.with_name(f"{out.name}.part.json")
    note.touch()
    assert not _done(command)


def test_a_line_with_an_open_quote_is_told(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"stages.x: No closing quotation in train .unclosed"):
        _command("x", 'train "unclosed')
