"""`help`: what is chosen, what can be, and what a method's options are; by `--help` too."""

import subprocess
import sys

import pytest

from luthier.commands.cli import dispatch
from luthier.errors import PluginError


def shown(capsys, *arguments) -> str:
    assert dispatch(list(arguments)) == 0
    return capsys.readouterr().out


def test_it_shows_what_is_chosen_and_the_options_of_that(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    text = shown(capsys, "train", "--help")
    groups, _, rest = text.partition("\nrecipes")
    assert "full, lora ←" in groups
    assert "metrics ←, progress ←" in groups
    order = [
        groups.index(f"\n  {name} ")
        for name in ("data", "model", "adapter", "objective", "optimiser", "tracker")
    ]
    assert order == sorted(order), "groups stand in the order in which people need them"
    assert "optimiser.lr " in rest
    assert "quickstart      LoRA on SmolLM2-135M: sums of two or three numbers" in rest
    for flag in ("-m ", "--cfg job", "--config-dir FOLDER", "FILE.yaml"):
        assert flag in groups
    assert rest.rstrip().endswith("luthier train resume=RUN")


@pytest.mark.parametrize("words", [["--config-dir", "."], ["--config-dir=."], ["my.yaml"]])
def test_recipes_of_ones_own_are_listed(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\n# What I do. And more.\nseed: 1\n")
    (tmp_path / "my.yaml").touch()
    assert "mine            What I do." in shown(capsys, "train", *words, "--help")
    assert "mine" not in shown(capsys, "train", "--help")


def test_a_choice_replaces_the_default(capsys):
    text = shown(capsys, "train", "adapter=dora", "optimiser=galore", "-h")
    assert "dora ←" in text
    assert "lora ←" not in text
    assert "adapter=dora  " in text
    assert "optimiser=galore  " in text
    assert "optimiser.rank " in text
    with pytest.raises(PluginError, match="unknown adapter 'lroa': did you mean 'lora'"):
        dispatch(["help", "train", "adapter=lroa"])


def test_it_is_the_same_by_either_name(capsys):
    assert shown(capsys, "help", "fold") == shown(capsys, "fold", "--help")
    assert shown(capsys, "help") == shown(capsys, "--help") == shown(capsys, "-h") == shown(capsys)
    assert "usage: luthier plugins" in _exits(capsys, "plugins", "--help")
    assert "luthier fold [PATH] [OUT] [GROUP=CHOICE" in shown(capsys, "fold", "--help")


def _exits(capsys, *arguments) -> str:
    with pytest.raises(SystemExit):
        dispatch(list(arguments))
    return capsys.readouterr().out


def test_another_commands_options_come_after_its_own(capsys):
    text = shown(capsys, "plan", "--help")
    own, _, of_train = text.partition("\noptions of train\n")
    assert "memory_gb" in own
    assert "memory_gb" not in of_train.partition("examples")[0]
    assert "batch_size" in of_train
    assert "-m " not in own.partition("groups")[0], "no multirun is made of it"


def test_help_of_a_command_without_methods_imports_no_torch(strangers):
    source = """
        from dataclasses import dataclass
        from luthier import Command, hookimpl, option

        @dataclass
        class Options:
            '''Wait.'''
            seconds: int = option(1, "How long.")

        @dataclass(frozen=True)
        class Wait(Command):
            '''Wait.'''
            summary = "waits"
            options = Options

            def run(self, config):
                pass

        @hookimpl
        def register_commands(register):
            register("wait", Wait)
    """
    strangers.install("luthier-wait", {"command.wait": "wait_plugin"}, {"wait_plugin.py": source})
    code = (
        f"import sys; sys.path.insert(0, {str(strangers.folder)!r})\n"
        "from luthier.commands.cli import dispatch\n"
        "dispatch(['wait', '--help']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "seconds  How long. [1]" in done.stdout
