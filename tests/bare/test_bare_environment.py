"""Luthier and strangers as their users have them: wheels, in an environment with nothing else, elsewhere."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from email import message_from_bytes
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import NamedTuple

import pytest
from omegaconf import OmegaConf
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers import save_tiny, tiny_tokenizer, write_rows

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STRANGERS = sorted(path.parent for path in (ROOT / "contrib").glob("*/pyproject.toml"))
COMPARED = {"adapter": ("lora", "vera"), "objective": ("dpo", "cpo"), "optimiser": ("adamw", "lion")}
ROWS = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i}"} for i in range(8)]
RUN = ("model.path=base", "data=jsonl", "data.path=rows.jsonl", "batch_size=8", "max_steps=2", "log_every=1")

DIARY = {
    "pyproject.toml": """
        [build-system]
        requires = ["hatchling"]
        build-backend = "hatchling.build"

        [project]
        name = "luthier-diary"
        version = "0.3"
        dependencies = ["luthier"]

        [project.entry-points.luthier]
        "observer.diary" = "luthier_diary"
    """,
    "luthier_diary.py": """
        from pathlib import Path

        from luthier import hookimpl


        def note(line):
            with Path("diary.txt").open("a", encoding="utf-8") as diary:
                diary.write(line + "\\n")


        @hookimpl
        def before_train(config):
            note(f"{config.adapter.name} {config.objective.name} {config.optimiser.name}")


        @hookimpl
        def after_step(report):
            note(f"step {report.step}")


        @hookimpl
        def after_multirun(runs):
            note(f"{len(runs)} jobs")
    """,
}
"""A package that only observes: no method, no command."""


class Bare(NamedTuple):
    """An environment with Luthier and strangers, and an empty folder to work in."""

    python: Path
    folder: Path

    def run(self, *words: object) -> str:
        """Run an executable of the environment, and return what it prints."""
        done = subprocess.run(
            [self.python.parent / str(words[0]), *map(str, words[1:])],
            cwd=self.folder, env=environment(HOME=str(self.folder)), text=True, capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def environment(**more: str) -> dict[str, str]:
    """Return the environment of this process without what a test run puts into it."""
    own = ("PYTHON", "LUTHIER_", "COVERAGE", "COV_", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    return {**kept, "COLUMNS": "200", **more}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Bare:
    """Build the wheels of Luthier, of contrib's packages and of one more; install them, and nothing else.

    What they require is copied from the environment of the tests, where pip put it; pip, which finds nothing
    but the wheels, refuses to install what is not all there.
    """
    made = tmp_path_factory.mktemp("bare")
    write(made / "luthier-diary", DIARY)

    def pip(*words: Path | str) -> None:
        quiet = ("-m", "pip", "--quiet", "--disable-pip-version-check")
        alone = environment(PIP_CONFIG_FILE=os.devnull, PIP_FIND_LINKS="")
        subprocess.run([sys.executable, *quiet, *words], cwd=made, env=alone, check=True)

    sources = (ROOT, *STRANGERS, made / "luthier-diary")
    build = ("wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", made / "wheels")
    pip(*build, *sources)
    venv.create(made / "venv", symlinks=True)
    inside = made / "venv" / "bin" / "python"
    wheels = sorted((made / "wheels").iterdir())
    site = next((made / "venv").glob("lib/python*/site-packages"))
    for name in required([line for wheel in wheels for line in requirements_in(wheel)]):
        copy_files(distribution(name), site)
    pip("--python", inside, "install", "--no-index", "--no-compile", *wheels)
    return Bare(inside, tmp_path_factory.mktemp("elsewhere"))


def requirements_in(wheel: Path) -> list[str]:
    """Return what a wheel requires, in the words of its metadata."""
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(files.read(name)).get_all("Requires-Dist") or []


def required(lines: list[str]) -> set[str]:
    """Return the distributions that are required, and those that they require."""
    found: set[tuple[str, str]] = set()
    asked = [(line, "") for line in lines]
    while asked:
        line, extra = asked.pop()
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for more in ("", *requirement.extras):
            key = canonicalize_name(requirement.name), more
            if key not in found and not key[0].startswith("luthier"):
                found.add(key)
                asked += [(own, more) for own in distribution(key[0]).requires or ()]
    return {name for name, _ in found}


def copy_files(of: Distribution, site: Path) -> None:
    """Put the files of a distribution into another environment, but for its scripts."""
    for file in of.files or ():
        if ".." not in file.parts and (here := Path(str(of.locate_file(file)))).is_file():
            there = site / file
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(here, there)  # with its time, by which Python knows what is compiled


@pytest.fixture(scope="module")
def work(bare: Bare) -> Bare:
    """Give the bare environment a model and rows to work on."""
    save_tiny(bare.folder / "base")
    write_rows(bare.folder / "rows.jsonl", ROWS)
    return bare


def write(folder: Path, files: dict[str, str]) -> None:
    """Write files, the indentation they have here taken off."""
    folder.mkdir()
    for name, text in files.items():
        lines = text.strip("\n").rstrip().splitlines()
        indent = len(lines[0]) - len(lines[0].lstrip())
        (folder / name).write_text("\n".join(line[indent:] for line in lines) + "\n", encoding="utf-8")


def test_it_is_whole_and_comes_from_the_wheels(bare: Bare) -> None:
    """What Luthier imports it requires, and nothing reaches back into the repository."""
    checked = [sys.executable, "-m", "pip", "--python", bare.python, "check"]
    done = subprocess.run(checked, env=environment(), text=True, capture_output=True)
    assert "No broken requirements" in done.stdout, done.stdout + done.stderr
    places = bare.run(
        "python", "-c", "import luthier, luthier_plugins, sys; print(luthier.__file__, *sys.path)"
    )
    assert str(ROOT) not in places
    shown = bare.run("luthier", "plugins")
    assert {f"{path.name} 0.1.0" for path in STRANGERS} | {"luthier-diary 0.3"} <= {
        " ".join(pair) for line in shown.splitlines() for pair in itertools.pairwise(line.split())
    }


def test_a_multirun_of_methods_of_ours_and_of_theirs(work: Bare) -> None:
    """Every combination trains, is compared, and was seen by the stranger's lifecycle hooks."""
    choices = [f"{group}={','.join(names)}" for group, names in COMPARED.items()]
    shown = work.run("luthier", "train", "-m", *RUN, *choices, "hydra.sweep.dir=sweep")
    wanted = list(itertools.product(*COMPARED.values()))

    jobs = [work.folder / "sweep" / str(number) for number in range(len(wanted))]
    configs = [OmegaConf.load(job / "config.yaml") for job in jobs]
    assert [tuple(config[group].name for group in COMPARED) for config in configs] == wanted
    # Lion and AdamW, LoRA and VeRA, DPO and CPO: no two jobs may have done the same.
    losses = [json.loads((job / "metrics.jsonl").read_text().splitlines()[-1])["loss"] for job in jobs]
    assert len(set(losses)) == len(wanted)
    for values in wanted:
        row = " ".join(f"{group}={value}" for group, value in zip(COMPARED, values, strict=True))
        assert row in shown

    diary = (work.folder / "diary.txt").read_text().splitlines()
    assert diary == [line for job in wanted for line in (" ".join(job), "step 1", "step 2")] + ["8 jobs"]


def test_a_preset_of_theirs(work: Bare) -> None:
    """A stranger's recipe chooses its adapter and its options."""
    work.run("luthier", "train", "recipe=vera_small", *RUN, "objective=dpo", "run_dir=preset")
    saved = json.loads((work.folder / "preset" / "model" / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["r"]) == ("VERA", 256)


def test_a_command_of_theirs(work: Bare) -> None:
    """A stranger's command stands in the help, completes its positionals and does its work."""
    assert "(luthier-tokens 0.1.0)" in work.run("luthier", "--help")
    texts = [text for row in ROWS for text in row.values()]
    count = sum(map(len, tiny_tokenizer()(texts, add_special_tokens=False)["input_ids"]))
    shown = work.run("luthier", "tokens", "base", "data=jsonl", "data.path=rows.jsonl")
    assert shown.split() == [str(count), "tokens", "base"]
