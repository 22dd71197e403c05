"""Hydra's own options: it calls what stands there, so nothing but a short list reaches it (faults.md D1)."""

import os
import pickle

import pytest
from hydra.types import RunMode

import forked
from luthier import ConfigError, compose
from luthier.commands.cli import dispatch
from luthier.config import PRIMARY, prepare, session

DATA = ["data=jsonl", "data.path=x.jsonl", "model.path=m"]
TARGET = "+hydra.callbacks.x._target_=torch.load"
CALLBACK = "{_target_: torch.load, f: evil.pkl, weights_only: false}"
FILES = {
    "below_hydra": f"# @package _global_\nhydra: {{callbacks: {{x: {CALLBACK}}}}}\n",
    "by_package": f"# @package hydra.callbacks.x\n{CALLBACK}\n",
    "by_package_of_hydra": f"# @package hydra\ncallbacks: {{x: {CALLBACK}}}\n",
    "by_defaults": "# @package _global_\ndefaults:\n  - /plain@hydra.callbacks.x\n",
    "by_override": "# @package _global_\ndefaults:\n  - override /hydra/launcher: evil\n",
    "of_a_preset": "# @package _global_\ndefaults:\n  - /model/llama3_8b@hydra.callbacks.x\n",
    "elsewhere": f"# @package _global_\nmodel: {{shape: {{deep: [{CALLBACK}]}}}}\n",
    "environment": "# @package _global_\nhydra: {job: {env_set: {PYTHONPATH: /tmp}}}\n",
    "copied": "# @package _global_\nhydra: {job: {env_copy: [NOWHERE_SET]}}\n",
    "logging": "# @package _global_\nhydra: {job_logging: {version: 1, handlers: {x: {(): os.mkdir}}}}\n",
    "more_sources": "# @package _global_\nhydra: {searchpath: ['pkg://evil']}\n",
    "interpolated": "# @package _global_\nmodel: {shape: {a: 1}}\nhydra: {callbacks: '${model.shape}'}\n",
    "decoded": "# @package _global_\nhydra: {launcher: {n_jobs: '${oc.decode:\"{a: 1}\"}'}}\n",
    "script": '# @package _global_\nhydra: {launcher: {partition: "x\\nrm -r data"}}\n',
}


class Evil:
    def __reduce__(self):
        return os.mkdir, ("RAN",)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Hold a pickle that makes a folder when it is loaded, and files that would have it loaded."""
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "recipe").mkdir()
    for name, text in FILES.items():
        (tmp_path / "recipe" / f"{name}.yaml").write_text(text)
    (tmp_path / "plain.yaml").write_text(CALLBACK)
    (tmp_path / "hydra" / "launcher").mkdir(parents=True)
    (tmp_path / "hydra" / "launcher" / "evil.yaml").write_text("_target_: os.mkdir\nname: RAN\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([TARGET, "+hydra.callbacks.x.f=evil.pkl"], r"hydra\.callbacks\.x\._target_ names code to call"),
        (["++hydra.callbacks={x: {_target_: this.d}}"], "names code to call"),
        (["+hydra={callbacks: {x: {y: 1}}}"], r"hydra\.callbacks\.x\.y cannot be set"),
        (["hydra.job.env_set={PYTHONPATH: /tmp}"], r"hydra\.job\.env_set\.PYTHONPATH cannot be set"),
        (["+hydra.job.env_set.PYTHONPATH=/tmp"], r"hydra\.job\.env_set\.PYTHONPATH cannot be set"),
        (["hydra.job_logging.root=null"], r"hydra\.job_logging\.root cannot be set"),
        (["hydra.searchpath=[pkg://os]"], r"hydra\.searchpath\.0 cannot be set"),
        (["hydra/callbacks=x"], "hydra/callbacks cannot be set"),
        (["hydra/job_logging=stdout"], "hydra/job_logging cannot be set"),
        (["recipe@hydra.callbacks=quickstart"], r"hydra\.callbacks cannot be set"),
        (["hydra/launcher@hydra.callbacks.x=basic"], "hydra/launcher cannot be set"),
        (["~hydra.launcher"], r"hydra\.launcher cannot be set"),
        (["hydra.mode=MULTIRUN"], r"hydra\.mode cannot be set"),
        (["hydra.sweeper._target_=os.mkdir"], "names code to call"),
        (["+hydra.launcher.setup=[mkdir RAN]"], r"hydra\.launcher\.setup\.0 cannot be set"),
        (["+hydra.launcher.pre_dispatch='print(1)'"], r"hydra\.launcher\.pre_dispatch cannot be set"),
        (["+hydra.sweeper.custom_search_space=os.mkdir"], r"custom_search_space cannot be set"),
        (["hydra.run.dir=here"], "the folder of a run is set by run_dir=FOLDER"),
        (["+model.shape.x={_target_: os.mkdir}"], "names code to call"),
        (["hydra/launcher=joblib"], r"unknown hydra/launcher 'joblib': .* pip install hydra-joblib-launcher"),
        (["hydra/sweeper=optuna"], r"unknown hydra/sweeper 'optuna': .* pip install hydra-optuna-sweeper"),
    ],
)
@pytest.mark.parametrize("several", [[], ["-m"]], ids=["one", "several"])
def test_what_would_reach_hydra_is_one_line(folder, words, told, several):
    with pytest.raises(ConfigError, match=told) as error:
        dispatch(["train", *several, *DATA, *words])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("recipe", [name for name in FILES if name != "by_override"])
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_what_a_file_puts_into_hydra_is_one_line_that_names_it(folder, recipe, several):
    words = ["-m", f"recipe={recipe},quickstart"] if several else [f"recipe={recipe}"]
    file = "plain" if recipe == "by_defaults" else "llama3_8b" if recipe == "of_a_preset" else recipe
    told = rf"/{file}\.yaml: \S+ (cannot be set|names code to call)|^recipe/{file}: .* hydra.searchpath"
    with pytest.raises(ConfigError, match=told):
        dispatch(["train", "--config-dir", str(folder), *DATA, *words])


def test_a_launcher_of_ones_own_is_refused(folder):
    with pytest.raises(ConfigError, match=r"launcher/evil\.yaml: hydra\.launcher\._target_ names code"):
        dispatch(["train", "-m", "--config-dir", str(folder), *DATA, "recipe=by_override"])
    with pytest.raises(ConfigError, match=r"launcher/evil\.yaml: hydra\.launcher\._target_ names code"):
        dispatch(["train", "-m", "--config-dir", str(folder), *DATA, "hydra/launcher=evil"])


def test_python_is_refused_alike(folder):
    with pytest.raises(ConfigError, match="names code to call"):
        compose("train", [*DATA, TARGET])
    with pytest.raises(ConfigError, match=r"below_hydra\.yaml: hydra\.callbacks\.x\._target_ names code"):
        compose("train", [*DATA, "recipe=below_hydra"], folders=[folder])


def test_what_a_sweeper_makes_of_its_parameters_is_refused_too(folder):
    """A sweeper hands its jobs overrides that nobody typed."""
    prepare()
    with session("train", DATA) as app, pytest.raises(ConfigError, match="names code to call"):
        app.config_loader.load_sweep_config(
            app.compose_config(PRIMARY, DATA, RunMode.MULTIRUN), [*DATA, TARGET]
        )


def test_folders_launchers_and_sweepers_are_free(folder):
    (folder / "recipe" / "sweep.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /hydra/launcher: basic\n"
        "hydra: {sweep: {dir: there, subdir: 'job${hydra.job.num}'}, sweeper: {params: {seed: '1,2'}}}\n"
    )
    words = ["recipe=sweep", "hydra/sweeper=basic", "hydra.sweeper.max_batch_size=2", *DATA]
    with session("train", words, folders=[folder]) as app:
        node = app.compose_config(PRIMARY, words, RunMode.MULTIRUN).hydra
    assert (node.sweep.dir, node.sweeper.max_batch_size, node.sweeper.params.seed) == ("there", 2, "1,2")


@pytest.mark.slow
def test_a_stage_cannot_hand_an_environment_to_a_program(folder):
    """By the command line itself: a module of that folder would be imported by the stage's process."""
    (folder / "sitecustomize.py").write_text("import os; os.mkdir('RAN')\n")
    words = [f"++hydra.job.env_set.PYTHONPATH={folder}", "stages.one='train recipe=quickstart run_dir=one'"]
    done = forked.luthier("train", *DATA, *words, cwd=folder, env=dict(os.environ))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "hydra.job.env_set.PYTHONPATH cannot be set" in done.stderr
