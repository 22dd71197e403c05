"""Luthier and strangers as their users have them: wheels, in an environment with nothing else, elsewhere."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from omegaconf import OmegaConf

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
    """Build the wheels of Luthier, of contrib's packages and of one more; install them, and nothing else."""
    made = tmp_path_factory.mktemp("bare")
    write(made / "luthier-diary", DIARY)
    pip_environment = environment(PIP_CONSTRAINT=str(ROOT / "constraints.txt"))

    def python(executable: Path | str, *words: object) -> None:
        subprocess.run([executable, *map(str, words)], cwd=made, env=pip_environment, check=True)

    quiet = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    sources = (ROOT, *STRANGERS, made / "luthier-diary")
    python(
        sys.executable,
        *quiet,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        made / "wheels",
        *sources,
    )
    python(sys.executable, "-m", "venv", made / "venv")
    inside = made / "venv" / "bin" / "python"
    # By itself and first, so that the others find the pinned build installed.
    python(inside, *quiet, "install", "--no-compile", "torch")
    python(inside, *quiet, "install", "--no-compile", *sorted((made / "wheels").iterdir()))
    return Bare(inside, tmp_path_factory.mktemp("elsewhere"))


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
    assert "No broken requirements" in bare.run("pip", "check")
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
