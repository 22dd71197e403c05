"""Commands of third parties: found, refused where they cannot be, and never the end of the others."""

import pytest

from luthier.commands.cli import dispatch
from luthier.errors import ConfigError, LuthierError, PluginError
from luthier.registry import command, command_names, commands
from luthier.registry.discovery import plugins
from luthier.registry.method_catalogue import Catalogue
from luthier.testing import CommandSuite

SOURCE = """
    from dataclasses import dataclass
    from typing import Any, ClassVar
    from luthier import Command, hookimpl, option

    @dataclass
    class Options:
        '''Say it.'''
        text: str = option("nothing", "What is said.")
        times: int = option(1, "How often.")

    @dataclass(frozen=True)
    class Say(Command):
        '''Say something.'''
        summary: ClassVar[str] = "what is said, on the screen"
        options: ClassVar[type[Any]] = Options
        positionals: ClassVar[tuple[str, ...]] = ("text", "times")

        def run(self, config):
            print(" ".join([config.text] * config.times))
            return config.text

    @hookimpl
    def register_commands(register):
        register("NAME", Say)
"""


READS = """
    from dataclasses import dataclass
    from typing import Any, ClassVar
    from luthier import Command, hookimpl, option

    @dataclass
    class Options:
        '''Name it.'''
        data: Any = "???"

    @dataclass(frozen=True)
    class Named(Command):
        '''Name the file of a data set.'''
        summary: ClassVar[str] = "the file of a data set"
        options: ClassVar[type[Any]] = Options
        defaults: ClassVar[dict[str, Any]] = {"data": "jsonl"}
        positionals: ClassVar[tuple[str, ...]] = ("data.path",)

        def run(self, config):
            print(config.data.path)
            return config.data.nothing

    @hookimpl
    def register_commands(register):
        register("named", Named)
"""


@pytest.fixture
def say(strangers):
    """A stranger's command, known to this process for the test."""
    strangers.install(
        "luthier-say", {"command.say": "say_plugin"}, {"say_plugin.py": SOURCE.replace("NAME", "say")}
    )
    with strangers.in_catalogue():
        yield


def test_a_strangers_command_is_listed_with_its_package_and_runs(say, tmp_path, monkeypatch, capsys):
    import luthier

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "say" in command_names()
    assert dispatch(["--help"]) == 0
    assert "say what is said, on the screen (luthier-say 0.2)" in " ".join(capsys.readouterr().out.split())
    assert dispatch(["say", "it's [here]", "2"]) == 0
    assert capsys.readouterr().out == "it's [here] it's [here]\n"
    assert dispatch(["say", "times=2"]) == 0
    assert capsys.readouterr().out == "nothing nothing\n"
    assert luthier.say(luthier.compose("say", ["text=here"])) == "here"
    assert not list((tmp_path / "here").iterdir()), "it has no run folder"


@pytest.mark.parametrize("word", ["null", "1", "a\\b", "a\\'b", "a\\", "'", "a,b", "[x]", " x ", "a:/b", "ü"])
def test_a_bare_word_is_text_as_it_was_typed(say, word, capsys):
    assert dispatch(["say", word]) == 0
    assert capsys.readouterr().out == f"{word}\n"


def test_what_makes_no_run_folder_is_run_once(say, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(
        LuthierError, match=r"^say writes no run folder; leave out -m and give one value each$"
    ):
        dispatch(["say", "-m", "times=1,2"])
    assert not list((tmp_path / "here").iterdir())


def test_what_a_command_asks_of_its_config_in_vain_is_one_line(strangers, capfd):
    strangers.install("luthier-named", {"command.named": "named_plugin"}, {"named_plugin.py": READS})
    with strangers.in_catalogue():
        with pytest.raises(ConfigError, match=r"^data.path must be set: data.path=VALUE$"):
            dispatch(["named"])
        with pytest.raises(ConfigError, match=r"^data.nothing: Key 'nothing' not in 'JsonLinesConfig'$"):
            dispatch(["named", "rows.jsonl"])
        # Nothing but what it printed itself: Hydra has lines of its own for an error.
        assert capfd.readouterr() == ("rows.jsonl\n", "")


def test_a_word_may_fill_an_option_of_a_method(strangers):
    strangers.install("luthier-named", {"command.named": "named_plugin"}, {"named_plugin.py": READS})
    with strangers.in_catalogue():

        class Suite(CommandSuite):
            method = type(command("named"))

        Suite().test_its_positionals_are_options()
        Suite.method.positionals = ("data.nowhere",)
        with pytest.raises(AssertionError, match=r"positional 'data.nowhere' is no option"):
            Suite().test_its_positionals_are_options()


def test_a_word_too_many_is_one_line_with_the_way_out(say):
    with pytest.raises(ConfigError, match=r"'c' is a word too many: luthier say takes TEXT TIMES; .*c=VALUE"):
        dispatch(["say", "a", "2", "c"])
    with pytest.raises(ConfigError, match="unknown option 'txt': did you mean 'text'"):
        dispatch(["say", "txt=1"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--nonsense"], "'--nonsense' is no flag; known: -m, "),
        (["--mutlirun"], "'--mutlirun' is no flag"),
        (["a", "--cfg"], "--cfg: expected one argument; .* --cfg job"),
        (["a", "--cfg=jbo"], "--cfg: invalid choice: 'jbo' .*job"),
        (["a", "--config-dir="], "--config-dir= is no folder"),
        (["a", "--config-dir", "nowhere"], "--config-dir=nowhere is no folder"),
        (
            ["--config-path=x", "-cn", "y"],
            "--config-path is no flag of luthier; write: luthier say FOLDER/FILE",
        ),
        (["-sc", "install=bash"], "-sc is no flag of luthier; write: .*luthier completion bash"),
        (["--hydra-help"], "luthier say --help"),
        (["-1"], "'-1' is no flag"),
        (["a", "text=b"], "text is given twice: by name, and by a word without ="),
        (["a", "2", "times=3"], "times is given twice"),
    ],
)
def test_flags_and_words_that_mean_nothing_are_one_line(say, words, told):
    with pytest.raises(ConfigError, match=told) as error:
        dispatch(["say", *words])
    assert "\n" not in str(error.value)


def test_the_value_of_a_flag_is_no_word_of_the_command(say, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for words in (
        ["here", "--cfg", "job", "times=2"],
        ["--config-dir", "mine", "--cfg=job", "here", "times=2"],
        ["-c", "job", "--config-dir=mine", "here", "times=2"],
    ):
        assert dispatch(["say", *words]) == 0
        assert capsys.readouterr().out == "text: here\ntimes: 2\n"


@pytest.mark.parametrize("name", ["policy", "compose", "train", "text"])
def test_a_name_that_luthier_has_is_refused(strangers, name):
    strangers.install(
        "odd", {f"command.{name}": "odd_plugin"}, {"odd_plugin.py": SOURCE.replace("NAME", name)}
    )
    found = Catalogue([plugin for plugin in plugins() if plugin.distribution == "odd"])
    assert f"command '{name}' would hide luthier.{name}" in found.broken[f"command.{name}"]


def test_two_packages_with_one_command_are_both_named(strangers):
    for package in ("one", "two"):
        source = {f"{package}_plugin.py": SOURCE.replace("NAME", "twin")}
        strangers.install(package, {"command.twin": f"{package}_plugin"}, source)
    with (
        strangers.in_catalogue(),
        pytest.raises(PluginError, match=r"registered twice: by one 0.2 .* two 0.2"),
    ):
        command("twin")


@pytest.mark.parametrize("ending", ["raise RuntimeError('no')", "raise SystemExit(3)"])
def test_one_that_ends_while_it_is_imported_leaves_the_others(strangers, capsys, ending):
    strangers.install("bad", {"command.bad": "bad_plugin"}, {"bad_plugin.py": ending})
    with strangers.in_catalogue():
        assert "train" in command_names()
        assert dispatch(["--help"]) == 0
        assert "bad cannot be used: bad 0.2 " in " ".join(capsys.readouterr().out.split())
        with pytest.raises(PluginError, match=r"command 'bad' cannot be used: bad 0\.2"):
            dispatch(["bad"])
        assert dispatch(["plugins", "--load"]) == 1
        assert "broken command.bad: bad 0.2 " in " ".join(capsys.readouterr().out.split())


def test_a_command_stands_alone_in_its_entry_point(strangers):
    strangers.install(
        "odd", {"optimiser.odd": "odd_plugin"}, {"odd_plugin.py": SOURCE.replace("NAME", "odd")}
    )
    found = Catalogue([plugin for plugin in plugins() if plugin.distribution == "odd"])
    assert "an entry point 'command.odd' registers a command" in found.broken["optimiser.odd"]


def test_the_commands_are_those_that_their_entry_points_announce():
    announced = {p.method for p in plugins() if p.kind == "command"}
    assert {known.name for known in commands().all()} == announced
    assert commands().broken == {}


def test_what_is_broken_is_named_when_the_catalogue_loads(strangers, caplog):
    from luthier.registry import catalogue

    strangers.install("bad", {"optimiser.bad": "bad_plugin"}, {"bad_plugin.py": "1 / 0"})
    with strangers.in_catalogue():
        catalogue()
    assert "optimiser.bad is left out: bad 0.2 ZeroDivisionError: division by zero" in caplog.text
