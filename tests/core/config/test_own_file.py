"""A YAML file of one's own, and the config of a run, as what a command composes (faults.md E)."""

import json

import pytest
from omegaconf import OmegaConf

import forked
from helpers import save_tiny, write_rows
from luthier import ConfigError, LuthierError, compose
from luthier.commands.cli import dispatch

DATA = ["model.path=base", "data=jsonl", "data.path=rows.jsonl"]


def composed(tmp_path, text, *overrides, name="my.yaml", **files):
    for other, content in {name.partition(".")[0]: text, **files}.items():
        (tmp_path / f"{other}.{name.partition('.')[2]}").write_text(content)
    return compose("train", [*DATA, *overrides], file=tmp_path / name)


@pytest.mark.parametrize(
    "text",
    [
        "defaults: [{adapter: dora}]\nadapter: {rank: 3}",
        "defaults: [{override /adapter: dora}, _self_]\nadapter: {rank: 3}",
        "defaults: [_self_, {/adapter: dora}]\nadapter: {rank: 3}",
        "adapter: {name: dora, rank: 3}",
    ],
)
def test_a_method_is_chosen_in_every_way_that_one_would_write(tmp_path, text):
    config = composed(tmp_path, text)
    assert (config.adapter.name, config.adapter.rank) == ("dora", 3)


def test_the_file_goes_before_its_recipe_and_the_command_line_before_the_file(tmp_path):
    text = "recipe: quickstart\nadapter: dora\noptimiser: {lr: 0.5}\ntracker: [metrics]\nepochs: 3\n"
    config = composed(tmp_path, text, "epochs=2")
    assert (config.adapter.name, config.adapter.rank) == ("dora", 16), "rank is the recipe's"
    assert (config.optimiser.lr, config.epochs, list(config.trackers)) == (0.5, 2, ["metrics"])
    assert composed(tmp_path, text, "adapter=lora").adapter.name == "lora"


def test_files_beside_it_may_be_in_its_defaults(tmp_path):
    config = composed(tmp_path, "defaults: [shared]\nseed: 4\n", shared="seed: 3\nepochs: 5\n")
    assert (config.seed, config.epochs) == (4, 5)


@pytest.mark.parametrize(
    ("preset", "word"),
    [
        ("recipe/quickstart", "recipe=quickstart"),
        ("data/sums", "data=sums"),
        ("model/llama3_8b", "model=llama3_8b"),
        ("adapter/lora", "adapter=lora"),
        ("adapter/lora", "seed=1"),
        ("optimiser/adamw", "seed=1"),
    ],
)
@pytest.mark.parametrize("beside", [True, False], ids=["beside a file", "in --config-dir"])
def test_e_a_preset_of_ones_own_with_the_name_of_another_is_refused(tmp_path, preset, word, beside):
    (tmp_path / preset).parent.mkdir()
    (tmp_path / f"{preset}.yaml").write_text("{}")
    (tmp_path / "my.yaml").write_text("seed: 3")
    own = {"file": tmp_path / "my.yaml"} if beside else {"folders": [tmp_path]}
    with pytest.raises(ConfigError, match=rf"/{preset}\.yaml has the name of another {preset}: rename it$"):
        compose("train", [*DATA, word], **own)


WRITTEN = ["1.10", "010", "1:30", "2026_11_27", "no", "0x1F", "1e3", "2026-11-28", "off"]


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("where", ["file", "beside", "recipe"])
def test_e_text_in_a_file_stays_as_it_is_written(tmp_path, written, where):
    ours = f"run_dir: {written}\nmodel: {{new_tokens: [{written}]}}\ndata: {{columns: {{text: {written}}}}}\n"
    files = {"file": ours, "beside": "defaults: [beside]", "recipe": "recipe: mine"}
    (tmp_path / "recipe").mkdir()
    (tmp_path / "beside.yaml").write_text(ours)
    (tmp_path / "recipe/mine.yaml").write_text(f"# @package _global_\n{ours}")
    config = composed(tmp_path, files[where])
    found = config.run_dir, *config.model.new_tokens, config.data.columns.text
    assert found == (written, written, written)


@pytest.mark.parametrize("written", WRITTEN)
def test_e_text_in_a_preset_of_ones_own_stays_as_it_is_written(tmp_path, written):
    (tmp_path / "data").mkdir()
    text = f"defaults: [json]\ncolumns: {{text: {written}}}\npath: {written}"
    (tmp_path / "data/mine.yaml").write_text(text)
    config = compose("train", ["model.path=base", "data=mine"], folders=[tmp_path])
    assert (config.data.path, config.data.columns.text) == (written, written)


def test_e_what_is_no_text_is_read_as_yaml(tmp_path):
    config = composed(tmp_path, "seed: 0x10\nmodel: {gguf_package: null}\nmax_grad_norm: 1e1\nresume: no\n")
    assert (config.seed, config.model.gguf_package, config.max_grad_norm) == (16, None, 10.0)


def test_c_aliases_that_multiply_are_one_line(tmp_path):
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    laughs += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    with pytest.raises(ConfigError, match=r"holds itself, or has 100,000 values and more"):
        composed(tmp_path, laughs)


@pytest.mark.parametrize(
    "text",
    [
        "defaults: [1]", "defaults: [{}]", "adapter: {name: 3}", "defaults: [my]", "model: &m {shape: *m}",
        f"seed: {'[' * 2000}{']' * 2000}",
    ],
)  # fmt: skip
def test_c_what_has_not_the_form_of_a_config_is_one_line(tmp_path, text):
    with pytest.raises(
        ConfigError,
        match=r"not the form of one|nested too deeply|my.yaml:1: found unconstructable",
    ):
        composed(tmp_path, text)


def test_a_folder_that_is_given_twice_is_one(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine.yaml").write_text("defaults: [lora]\nrank: 5\n")
    (tmp_path / "my.yaml").write_text("adapter: mine")
    folders = [tmp_path, tmp_path / "adapter" / ".."]
    assert compose("train", DATA, file=tmp_path / "my.yaml", folders=folders).adapter.rank == 5


def test_e_a_file_beside_ones_own_takes_no_schemas_place(tmp_path):
    with pytest.raises(ConfigError, match=r"/train_schema\.yaml has the name of another train_schema"):
        composed(tmp_path, "seed: 3", train_schema="seed: 4")


def test_e_the_config_of_a_training_is_none_of_an_evaluation(tmp_path):
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(compose("train", DATA)))
    with pytest.raises(ConfigError, match=r"config\.yaml: unknown option 'adapter': this command has no ad"):
        compose("evaluate", DATA, file=tmp_path / "config.yaml")


@pytest.mark.parametrize("name", ["train.yaml", "run_folder.yaml", "config.yml", "a b.yaml"])
def test_any_name_will_do(tmp_path, name):
    assert composed(tmp_path, "seed: 9", name=name).seed == 9


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("optimiser: {lrr: 1}", r"my\.yaml: unknown option 'optimiser\.lrr': did you mean 'optimiser\.lr'\?"),
        ("optimiser: {lr: fast}", r"my\.yaml: optimiser\.lr: Value 'fast'"),
        ("adaptr: x", r"my\.yaml: unknown option 'adaptr': did you mean 'adapter'\?"),
        ("defaults: [{adapter: lroa}]", r"my\.yaml: unknown adapter 'lroa': did you mean 'lora'\?"),
        ("defaults: [nowhere]", r"my\.yaml: Could not load 'nowhere'"),
        ("adapter: null", r"'adapter' must be chosen: adapter=NAME"),
        ("a: [1\nb: 2", r"my\.yaml:2: expected ',' or ']'"),
        ("seed: 1\nseed: 2", r"my\.yaml:2: found duplicate key seed"),
        ("seed: !!python/object/apply:os.mkdir [RAN]", r"my\.yaml:1: could not determine a constructor"),
        ("- 1", r"my\.yaml: expected options as OPTION: VALUE"),
        ("defaults: 3", r"my\.yaml: expected options"),
        ("hydra: {searchpath: ['pkg://os']}", r"my\.yaml: hydra\.searchpath\.0 cannot be set"),
        ("model: {shape: {_target_: os.mkdir}}", r"my\.yaml: model\.shape\._target_ names code to call"),
    ],
)
def test_a_mistake_is_one_line_with_file_and_key(tmp_path, text, told):
    with pytest.raises(LuthierError, match=told) as error:
        composed(tmp_path, text)
    assert "\n" not in str(error.value)


def test_what_is_no_file_of_text_is_one_line(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"run_dir: \xff")
    for name, told in {"latin.yaml": "is no text in UTF-8", "nowhere.yaml": "No such file"}.items():
        with pytest.raises(LuthierError, match=told) as error:
            compose("train", DATA, file=tmp_path / name)
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ("# @package _global_\noptimiser: {lrr: 1}", r"^recipe/mine: unknown option 'optimiser\.lrr'"),
        ("# @package _global_\nadaptr: {x: 1}", r"^recipe/mine: unknown option 'adaptr'"),
        ("# @package _global_\na: [1\nb", r"recipe/mine\.yaml:3: expected"),
        ("optimiser: {lr: 1}", r"^recipe/mine: .*a recipe begins with the line '# @package _global_'"),
    ],
)
def test_a_mistake_in_a_recipe_of_ones_own_keeps_its_cause(tmp_path, recipe, told):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(recipe)
    with pytest.raises(ConfigError, match=told) as error:
        compose("train", [*DATA, "recipe=mine"], folders=[tmp_path])
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("own")
    save_tiny(path / "base")
    write_rows(path / "rows.jsonl", [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(8)])
    (path / "my.yaml").write_text(
        "defaults: [{adapter: dora}]\nmodel: {path: base}\ndata: {name: jsonl, path: rows.jsonl}\n"
        "adapter: {rank: 2}\nmax_steps: 1\ntracker: [metrics]\nrun_dir: first\n"
    )
    return path


@pytest.mark.slow
def test_a_file_and_the_config_of_its_run_train(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert dispatch(["train", "my.yaml", "optimiser.lr=1e-4"]) == 0
    assert dispatch(["train", "first/config.yaml", "max_steps=2", "run_dir=2026_11_27"]) == 0
    second = compose("train", file="2026_11_27/config.yaml")
    assert (second.adapter.name, second.adapter.rank, second.optimiser.lr) == ("dora", 2, 1e-4)
    assert json.loads((folder / "2026_11_27" / "summary.json").read_text())["steps"] == 2
    assert second.run_dir.startswith("runs/"), "a new run has a folder of its own"
    changed = compose("train", ["adapter=full"], file="first/config.yaml")
    assert changed.adapter.name == "full"
    (folder / "e.yaml").write_text("data: {name: jsonl, path: rows.jsonl}\nevaluation: {generate: false}\n")
    assert dispatch(["evaluate", "first", "e.yaml", "run_dir=judged"]) == 0
    assert (folder / "judged" / "summary.json").exists()


@pytest.mark.slow
def test_in_a_multirun_run_dir_is_the_folder_of_the_sweep(folder):
    for words in (["my.yaml", "run_dir=sweep"], ["my.yaml", "hydra.sweep.dir=other"]):
        done = forked.luthier("train", *words, "-m", "seed=1,2", cwd=folder)
        assert done.returncode == 0, done.stderr
        where = folder / words[1].partition("=")[2]
        assert sorted(path.parent.name for path in where.glob("*/summary.json")) == ["0", "1"]


def test_two_files_are_one_too_many(tmp_path):
    with pytest.raises(ConfigError, match=r"'b\.yml' is a file too many"):
        dispatch(["train", "a.yaml", "b.yml"])
