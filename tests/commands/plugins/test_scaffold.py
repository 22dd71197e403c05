"""``luthier plugins new``: what it writes works at once, of every kind; what cannot be is one line."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from luthier import ConfigError, LuthierError, PluginError
from luthier.commands.cli import dispatch
from luthier.contracts.kinds import ALL_KINDS
from luthier_plugins.commands.plugins.scaffold import new_plugin

pytestmark = pytest.mark.slow


def run(*command, folder, path=()):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def installed(target: Path) -> None:
    """What ``pip install -e`` leaves: metadata beside the package, both put on PYTHONPATH by `run`."""
    info = target / f"{target.name.replace('-', '_')}-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {target.name}\nVersion: 0.1.0\n")
    entries = (target / "pyproject.toml").read_text().partition("[project.entry-points.luthier]\n")[2]
    (info / "entry_points.txt").write_text("[luthier]\n" + entries.partition("\n\n")[0].replace('"', ""))


def test_the_generated_tests_pass_at_once(tmp_path):
    kinds = [kind for kind in ALL_KINDS if kind != "quantiser" or importlib.util.find_spec("bitsandbytes")]
    targets = [new_plugin(kind, f"toy_{kind}", tmp_path) for kind in kinds]
    assert targets[0] == tmp_path / "luthier-toy-adapter"
    for target in targets:
        installed(target)
    # One process for all: importing torch takes longer than the tests.
    done = run("pytest", "-v", "-W", "error", *map(str, targets), folder=tmp_path, path=targets)
    assert done.returncode == 0, done.stdout
    for kind in kinds:
        assert f"test_toy_{kind}.py::Test" in done.stdout


def test_what_is_written_is_clean_by_its_own_rules(tmp_path):
    pytest.importorskip("ruff")
    pytest.importorskip("mypy")
    targets = [new_plugin(kind, name, tmp_path / kind) for kind in ALL_KINDS for name in (f"toy_{kind}", "x")]
    for command in (["ruff", "check", "--no-cache", "."], ["ruff", "format", "--no-cache", "--check", "."]):
        done = run(*command, folder=tmp_path)
        assert done.returncode == 0, done.stdout
    methods = [str(next(target.glob("luthier_toy*/toy*.py"))) for target in targets[::2]]
    # By the project's configuration, whose cache `make lint` has filled: torch alone takes a minute.
    done = run("mypy", "--strict", "--scripts-are-modules", *methods, folder=Path(__file__).parents[3])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["adapter", "command", "tracker"])
def test_installed_it_is_registered_under_its_name(kind, tmp_path):
    target = new_plugin(kind, "toy", tmp_path)
    installed(target)
    done = run("luthier", "plugins", "--load", folder=tmp_path, path=[target])
    assert done.returncode == 0, done.stdout
    assert "luthier-toy 0.1.0" in done.stdout
    again = run(
        "luthier", "plugins", "new", kind, "toy", "--folder", "elsewhere", folder=tmp_path, path=[target]
    )
    assert again.returncode == 2
    assert again.stderr == f"luthier: {kind} 'toy' is registered by luthier-toy 0.1.0; choose another name\n"
    other = run(
        "luthier", "plugins", "new", "merger", "toy", "--folder", "elsewhere", folder=tmp_path, path=[target]
    )
    assert other.stderr == "luthier: luthier-toy 0.1.0 is installed already; choose another name\n"
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("kind", "name", "error", "told"),
    [
        ("optimizer", "toy", LuthierError, "unknown kind 'optimizer': did you mean 'optimiser'?"),
        ("optimiser", "Toy", ConfigError, "'Toy' cannot name a method"),
        ("optimiser", "a-b", ConfigError, "'a-b' cannot name a method"),
        ("optimiser", "lambda", ConfigError, "no word of Python's"),
        ("optimiser", "adamw", PluginError, r"optimiser 'adamw' is registered by luthier 0\."),
    ],
)
def test_a_name_that_cannot_be_used_is_refused(kind, name, error, told, tmp_path):
    with pytest.raises(error, match=told):
        new_plugin(kind, name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_kept(tmp_path):
    target = new_plugin("merger", "toy", tmp_path)
    (target / "mine.txt").write_text("work")
    with pytest.raises(ConfigError, match="exists already"):
        new_plugin("merger", "toy", tmp_path)
    assert (target / "mine.txt").read_text() == "work"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written: "):
        new_plugin("merger", "toy", tmp_path / "file")


def test_it_says_what_to_do_next(tmp_path, capsys):
    assert dispatch(["plugins", "new", "objective", "toy", "--folder", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"pip install -e {tmp_path / 'luthier-toy'}" in shown
    assert "is a working objective" in shown
