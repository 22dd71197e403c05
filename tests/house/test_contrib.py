"""The packages in contrib are strangers: visible and usable everywhere, named nowhere in the product."""

import ast
import json
import os
import re
from pathlib import Path

import pytest

import forked
from helpers import save_tiny, write_rows
from luthier import compose, plugins
from luthier.commands.cli import dispatch

ROOT = Path(__file__).parents[2]
INSTALLED = {plugin.distribution for plugin in plugins()}
PACKAGES = sorted(path.parent for path in (ROOT / "contrib").glob("*/pyproject.toml"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not {path.name for path in PACKAGES} <= INSTALLED, reason="contrib is not installed: see the Makefile"
    ),
]


def luthier(folder, *arguments):
    return forked.luthier(*arguments, cwd=folder, env={**os.environ, "COLUMNS": "200"})


def test_they_are_listed_with_their_distribution(capsys):
    assert dispatch(["plugins"]) == 0
    shown = capsys.readouterr().out
    assert "luthier-cpo 0.1.0" in shown
    assert "luthier-lion 0.1.0" in shown
    assert "luthier-vera 0.1.0" in shown


def test_help_shows_their_options(capsys):
    assert dispatch(["train", "adapter=vera", "optimiser=lion", "objective=cpo", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "adapter.projection_seed" in shown
    assert "optimiser.beta2" in shown
    assert "objective.nll_weight" in shown
    assert "lion" in shown.partition("recipes, ")[0], "it stands among the optimisers"
    assert "vera_small" in shown


def test_a_preset_of_theirs_composes():
    config = compose("train", ["recipe=vera_small", "model.path=base", "data=jsonl", "data.path=rows.jsonl"])
    assert (config.adapter.name, config.adapter.rank, config.optimiser.lr) == ("vera", 256, 5e-3)


def test_a_multirun_puts_them_beside_the_built_in_ones(tmp_path):
    save_tiny(tmp_path / "base")
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(8)]
    write_rows(tmp_path / "rows.jsonl", rows)
    done = luthier(
        tmp_path, "train", "-m", "model.path=base", "data=jsonl", "data.path=rows.jsonl", "batch_size=8",
        "model.dtype=float32", "max_steps=2", "optimiser=adamw,lion", "adapter=vera", "hydra.sweep.dir=sweep",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "optimiser=lion" in done.stdout
    saved = tmp_path / "sweep" / "1" / "model"
    assert json.loads((saved / "adapter_config.json").read_text())["peft_type"] == "VERA"
    # And the folder is found by its kind, through the reader its package registered.
    again = luthier(
        tmp_path, "evaluate", f"model.path={saved}", "data=jsonl", "data.path=rows.jsonl",
        "evaluation.generate=false", "model.dtype=float32",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "held out: loss" in again.stdout


def test_nothing_of_the_product_names_them():
    words = [path.name.partition("-")[2] for path in PACKAGES]
    assert words == ["cpo", "lion", "slerp", "tokens", "vera"]
    words[words.index("tokens")] = "luthier[-_]tokens"  # by itself it is a word of everybody's
    naming = re.compile(rf"(?<![a-z])({'|'.join(words)})(?![a-z])", re.IGNORECASE)
    for folder in ("core", "plugins", "conf"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix not in (".py", ".yaml", ".template"):
                continue
            found = naming.findall(path.read_text(encoding="utf-8"))
            assert not found, f"{path} names {found}"


def test_a_paired_loss_takes_under_twenty_lines():
    """The class from its decorator on, without docstrings and blank lines."""
    text = (ROOT / "contrib" / "luthier-cpo" / "luthier_cpo" / "cpo.py").read_text(encoding="utf-8")
    (method,) = (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef))
    own = range(method.decorator_list[0].lineno, method.end_lineno + 1)
    told = set()
    for node in ast.walk(method):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            told.update(range(node.lineno, node.end_lineno + 1))
    assert sum(bool(text.splitlines()[line - 1].strip()) for line in own if line not in told) < 20


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_they_use_public_names_only(package):
    for path in package.rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.lstrip().startswith(("from luthier.", "import luthier.")):
                assert line.startswith("from luthier.testing import "), f"{path}: {line}"
