"""The catalogue: what loads, what is broken, and what each is told."""

import subprocess
import sys

import pytest

from luthier.contracts.kinds import KINDS
from luthier.errors import PluginError
from luthier.registry.discovery import plugins
from luthier.registry.method_catalogue import Catalogue, catalogue, require
from strangers import OPTIMISER


def load() -> Catalogue:
    return Catalogue(plugins())


def optimiser(name: str) -> str:
    return OPTIMISER.replace("NAME", name)


def test_every_built_in_entry_point_registers_the_method_its_name_announces():
    found = catalogue()
    announced = {(p.kind, p.method) for p in plugins() if p.distribution == "luthier" and p.kind in KINDS}
    registered = {(one.kind, one.name) for one in found.all() if one.plugin.distribution == "luthier"}
    assert registered == announced
    assert found.broken == {}


def test_a_strangers_method_is_found_with_its_distribution_and_version(strangers):
    strangers.install("luthier-sgd", {"optimiser.sgd": "sgd_plugin"}, {"sgd_plugin.py": optimiser("sgd")})
    one = load().find("optimiser", "sgd")
    assert one.plugin.provider == "luthier-sgd 0.2"
    assert one.cls(lr=0.5).lr == 0.5


def test_what_a_half_finished_uninstall_leaves_is_left_out(strangers):
    strangers.install("gone", {"optimiser.gone": "gone_plugin"}, {})
    (strangers.folder / "gone-0.2.dist-info" / "METADATA").unlink()
    strangers.install("here", {"optimiser.here": "here_plugin"}, {"here_plugin.py": optimiser("here")})
    found = {one.entry.name: one.distribution for one in plugins()}
    assert "optimiser.gone" not in found
    assert found["optimiser.here"] == "here"


def test_one_broken_package_never_stops_the_others(strangers):
    # users.md row 42: one broken plugin killed the whole command line.
    strangers.install("bad", {"optimiser.bad": "bad_plugin"}, {"bad_plugin.py": "import nowhere_to_be_found"})
    strangers.install("good", {"optimiser.good": "good_plugin"}, {"good_plugin.py": optimiser("good")})
    found = load()
    assert found.find("optimiser", "good").name == "good"
    assert found.find("adapter", "lora").name == "lora"
    with pytest.raises(PluginError, match=r"'bad' cannot be used: bad 0.2 .*nowhere_to_be_found"):
        found.find("optimiser", "bad")


def test_a_name_registered_twice_names_both_sides_and_the_way_out(strangers):
    strangers.install("one", {"optimiser.twin": "one_plugin"}, {"one_plugin.py": optimiser("twin")})
    strangers.install("two", {"optimiser.twin": "two_plugin"}, {"two_plugin.py": optimiser("twin")})
    found = load()
    with pytest.raises(PluginError) as error:
        found.find("optimiser", "twin")
    message = str(error.value)
    assert "one 0.2 (one_plugin.Sgd)" in message
    assert "two 0.2 (two_plugin.Sgd)" in message
    assert "LUTHIER_BLOCKED=two" in message
    assert found.find("optimiser", "adamw").plugin.distribution == "luthier"


def test_replacing_a_built_in_means_blocking_it(strangers, monkeypatch):
    strangers.install("mine", {"optimiser.adamw": "mine_plugin"}, {"mine_plugin.py": optimiser("adamw")})
    with pytest.raises(PluginError, match="registered twice"):
        load().find("optimiser", "adamw")
    monkeypatch.setenv("LUTHIER_PLUGINS", "")
    assert load().find("optimiser", "adamw").plugin.distribution == "luthier"
    monkeypatch.setenv("LUTHIER_PLUGINS", "mine")
    monkeypatch.setenv("LUTHIER_BLOCKED", "optimiser.adamw")
    assert "adamw" not in load().names("optimiser")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            ("def register_optimisers", "def register_optimizers"),
            "unknown hook 'register_optimizers'.*did you mean",
        ),
        (("(register)", "(register=None)"), "must not give its arguments defaults"),
        (("frozen=True", "frozen=False"), "must be a frozen dataclass"),
        (('"NAME"', '"Bad-Name"'), "must match"),
        (("Sgd(Optimiser)", "Sgd"), "inherits luthier.Optimiser"),
        (("def build(", "def built("), "leaves build undefined"),
        (("    @hookimpl\n", ""), "implements no hook"),
        (("lr: float = option(0.1", "name: str = option('x'"), "has an option called 'name'"),
        (("lr: float", "lr: 'Rate'"), "cannot be configured: name 'Rate' is not defined"),
    ],
)
def test_what_is_wrong_with_a_plugin_is_said_at_load(strangers, change, told):
    source = OPTIMISER.replace(*change).replace("NAME", "odd")
    strangers.install("odd", {"optimiser.odd": "odd_plugin"}, {"odd_plugin.py": source})
    with pytest.raises(PluginError, match=f"'odd' cannot be used: .*{told}"):
        load().find("optimiser", "odd")


def test_nothing_of_a_plugin_counts_if_one_of_its_methods_is_unsound(strangers):
    source = optimiser("first") + '    register("Second!", Sgd)\n'
    strangers.install("half", {"optimiser.half": "half_plugin"}, {"half_plugin.py": source})
    assert "first" not in load().names("optimiser")


def test_a_plugin_for_another_core_version_is_not_loaded(strangers):
    strangers.install(
        "old", {"optimiser.old": "old_plugin"}, {"old_plugin.py": optimiser("old")}, requires="luthier<0.0.1"
    )
    with pytest.raises(PluginError, match=r"needs luthier<0.0.1, but luthier \d"):
        load().find("optimiser", "old")


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(
        PluginError, match=r"unknown adapter 'lroa': did you mean 'lora'\? known: .*full, lora"
    ):
        catalogue().find("adapter", "lroa")


@pytest.mark.parametrize(
    ("requirement", "told"),
    [
        ("luthier>=99", "is wanted, but luthier"),
        ("luthier-nowhere", "is not installed"),
        ("a b", "not a requir"),
    ],
)
def test_required_plugins_are_checked(requirement, told):
    with pytest.raises(PluginError, match=told):
        require([requirement])
    require(["luthier>=0.0.1"])


@pytest.mark.parametrize("arguments", [["--help"], ["plugins"], ["--version"]])
def test_help_and_plugins_do_not_import_torch(arguments):
    code = (
        "import sys; from luthier.commands.cli import dispatch\n"
        f"status = dispatch({arguments!r}); sys.exit(status or 10 * ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "luthier" in done.stdout.lower()


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("from luthier.commands.cli import dispatch; dispatch(['--help'])", {"hydra", "omegaconf", "rich"}),
        # What is imported before the command line listens to Ctrl-C; a room is no command to look for.
        ("import luthier.commands.cli", {"pluggy", "omegaconf", "packaging"}),
        ("from luthier import registry", {"pluggy", "omegaconf"}),
    ],
)
def test_what_starts_first_imports_little(code, unwanted):
    program = f"import sys; {code}; sys.exit(', '.join({unwanted!r} & sys.modules.keys()) or 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_public_names_are_listed_once_and_exist():
    import luthier

    assert len(luthier.__all__) == len(set(luthier.__all__))
    for name in luthier.__all__:
        assert getattr(luthier, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        luthier.trian  # noqa: B018


def test_presets_that_are_not_there_break_the_plugin_and_nothing_else(strangers):
    hook = "\n    @hookimpl\n    def config_packages():\n        return 'nowhere_conf'\n"
    strangers.install("bare", {"optimiser.bare": "bare_plugin"}, {"bare_plugin.py": optimiser("bare") + hook})
    found = load()
    assert "config_packages names nowhere_conf" in found.broken["optimiser.bare"]
    assert "nowhere_conf" not in found.config_packages
