"""Plugins that raise or exit, wherever they are called: told by name, and never as an end that went well.

faults.md D2 and E.
"""

import os
import re

import pytest

import forked
from helpers import save_tiny, write_rows
from luthier import hookimpl
from luthier.errors import PluginError
from luthier.registry import catalogue, plugins
from luthier.registry.method_catalogue import Catalogue

HOOK = "from luthier import hookimpl\n@hookimpl\ndef {hook}({arguments}):\n    {ending}\n"
ENDINGS = {
    "raise RuntimeError('no')": "RuntimeError: no",
    "raise SystemExit(0)": "SystemExit: 0",
    "import sys; sys.exit()": "SystemExit:",
    "raise GeneratorExit('out')": "GeneratorExit: out",
    "raise BaseException('base')": "BaseException: base",
}


def broken(strangers, source, files=None):
    strangers.install("bad", {"watch.bad": "bad_plugin"}, {"bad_plugin.py": source, **(files or {})})
    return Catalogue([plugin for plugin in plugins() if plugin.distribution == "bad"]).broken


@pytest.mark.parametrize("ending", ENDINGS)
def test_one_that_ends_at_import_is_named(strangers, ending):
    assert broken(strangers, ending)["watch.bad"].startswith(f"bad 0.2 {ENDINGS[ending]}")


@pytest.mark.parametrize("ending", ENDINGS)
def test_one_that_ends_while_it_registers_is_named(strangers, ending):
    source = HOOK.format(hook="register_trackers", arguments="register", ending=ending)
    told = f"bad 0.2 plugin watch.bad: register_trackers raised {ENDINGS[ending]}"
    assert broken(strangers, source)["watch.bad"].startswith(told)


def test_a_real_ctrl_c_stays_one(strangers):
    with pytest.raises(KeyboardInterrupt):
        broken(strangers, "raise KeyboardInterrupt")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("['bad_conf']", r"config_packages returns \['bad_conf'\], expected the dotted name of one package"),
        ("3", "config_packages returns 3, expected"),
        ("{'a': 1}", "config_packages returns {'a': 1}, expected"),
        ("''", "config_packages returns '', expected"),
        ("'nowhere'", "config_packages names nowhere, which is no package that it brings"),
        ("'../conf'", "config_packages returns '../conf', expected"),
        ("'nowhere.conf'", "nowhere"),
        ("'json.decoder'", "config_packages names json.decoder, which is no package"),
        ("'bad_conf'", "SystemExit: 0"),
    ],
)
def test_config_packages_that_name_no_package_are_a_named_report(strangers, value, told):
    source = HOOK.format(hook="config_packages", arguments="", ending=f"return {value}")
    files = {"bad_conf/__init__.py": "raise SystemExit(0)"}
    reason = broken(strangers, source, files)["watch.bad"]
    assert reason.startswith("bad 0.2 ")
    assert re.search(told, reason), reason


def test_a_wrapper_around_the_hooks_of_others_is_refused(strangers):
    source = "from luthier import hookimpl\n@hookimpl(wrapper=True)\ndef after_step(report):\n    yield\n"
    assert "hook 'after_step' must not be a wrapper" in broken(strangers, source)["watch.bad"]


@pytest.mark.parametrize("hook", ["after_train", "after_multirun", "after_header"])
def test_a_tracker_is_named_with_its_hook(hook):
    class Tracker:
        pass

    def fail(self):
        raise SystemExit(0)

    setattr(Tracker, hook, hookimpl(fail))
    manager, tracker = catalogue().hooks, Tracker()
    manager.register(tracker)
    argument = {"after_train": "result", "after_multirun": "runs", "after_header": "lines"}[hook]
    try:
        with pytest.raises(PluginError, match=rf"^plugin \S+Tracker: {hook} raised SystemExit: 0$") as error:
            getattr(manager.hook, hook)(**{argument: None})
    finally:
        manager.unregister(tracker)
    assert error.value.status == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("failing")
    save_tiny(path / "base")
    write_rows(path / "rows.jsonl", [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(8)])
    return path


def trained(folder, strangers, source, run_dir, *more):
    strangers.install("bad", {"watch.bad": "bad_plugin"}, {"bad_plugin.py": source})
    environment = {**os.environ, "PYTHONPATH": f"{strangers.folder}:{os.environ.get('PYTHONPATH', '')}"}
    words = ["model.path=base", "data=jsonl", "data.path=rows.jsonl", "max_steps=2", "log_every=1"]
    words += ["tracker=[]", f"run_dir={run_dir}", *more]
    return forked.luthier("train", *words, cwd=folder, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["raise SystemExit(0)", "raise RuntimeError('no')"])
@pytest.mark.parametrize("hook", ["after_config_composed", "before_train", "after_step", "after_train"])
def test_a_hook_that_ends_a_run_is_named_with_status_1(folder, strangers, tmp_path, hook, ending):
    source = HOOK.format(hook=hook, arguments="", ending=ending)
    done = trained(folder, strangers, source, tmp_path / "run")
    assert done.returncode == 1, done.stderr
    assert f"luthier: plugin bad:watch.bad: {hook} raised {ENDINGS[ending]}\n" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("ending", [*ENDINGS, "import luthier; raise luthier.DataError('mine')", "open('/')"])
def test_a_hook_that_is_told_of_an_error_never_hides_it(folder, strangers, tmp_path, ending):
    source = HOOK.format(hook="on_train_error", arguments="error", ending=ending)
    done = trained(folder, strangers, source, tmp_path / "run", "data.path=nowhere.jsonl")
    assert done.returncode == 2, done.stderr
    assert "nowhere.jsonl: there is no such file" in done.stderr
    assert "plugin bad:watch.bad: on_train_error raised" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("several", [[], ["-m", "seed=1,2"]], ids=["one", "several"])
def test_a_broken_plugin_of_hooks_alone_is_named_by_every_run(folder, strangers, tmp_path, several):
    done = trained(folder, strangers, "raise SystemExit(0)", tmp_path / "run", *several)
    assert done.returncode == 0, done.stderr
    assert "watch.bad is left out: bad 0.2 SystemExit: 0" in done.stderr


@pytest.mark.slow
def test_a_method_that_ends_the_program_is_no_run_that_went_well(folder, strangers, tmp_path):
    source = (
        "from dataclasses import dataclass\nfrom luthier import Optimiser, hookimpl\n"
        "@dataclass(frozen=True)\nclass Ends(Optimiser):\n"
        "    def build(self, parameters):\n        raise SystemExit(0)\n"
        "    def state_bytes(self, name, shape):\n        return 0.0\n"
        "@hookimpl\ndef register_optimisers(register):\n    register('ends', Ends)\n"
    )
    done = trained(folder, strangers, source, tmp_path / "run", "optimiser=ends")
    assert done.returncode == 2, done.stderr
    assert "train was ended before it was done, by " in done.stderr
    assert "bad_plugin.py:" in done.stderr
