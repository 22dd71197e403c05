"""``luthier plugins new``: a plugin package that works, to start from. Does not import torch."""

from __future__ import annotations

import keyword
import sys
from importlib import resources
from pathlib import Path
from string import Template

from packaging.utils import canonicalize_name

from luthier.contracts import ALL_KINDS, COMMAND, NAME, Kind
from luthier.errors import ConfigError, LuthierError, PluginError, unknown
from luthier.registry import CORE, plugins
from luthier.system import written_whole

# What a kind's example needs beyond torch.
_NEEDS = {
    "quantiser": ("bitsandbytes>=0.46", "transformers>=5.20"),
    "tracker": (),
    "data_source": (),
    "command": (),
}
_TORCH = ("torch>=2.8",)


def new_plugin(kind: str, name: str, folder: Path) -> Path:
    """Write a distribution ``luthier-NAME`` with a working method of `kind`, its tests and a README.

    Args:
        kind: A kind of method, e.g. ``optimiser``.
        name: The method's name: ``[a-z][a-z0-9_]*``.
        folder: Where the package's folder is put.

    Returns:
        The package's folder.

    Raises:
        LuthierError: The kind is unknown, the name is taken or no name, or the folder exists.
    """
    if kind not in ALL_KINDS:
        raise LuthierError(unknown("kind", kind, ALL_KINDS))
    _check_name(kind, name)
    target = folder.expanduser() / f"{CORE}-{name.replace('_', '-')}"
    if target.exists():
        raise ConfigError(f"{target} exists already; choose another name or --folder")
    words = _words(ALL_KINDS[kind], name)
    package = words["package"]
    try:
        with written_whole(target) as fresh:
            for path, template in {
                "pyproject.toml": "pyproject.toml",
                "README.md": "README.md",
                f"{package}/{name}.py": f"methods/{kind}.py",
                f"tests/test_{name}.py": "command_test.py" if kind == COMMAND.name else "test.py",
            }.items():
                _write(fresh / path, _filled(template, words))
            _write(
                fresh / package / "__init__.py",
                f'"""The {words["kind_words"]} {name}, a plugin of Luthier."""\n',
            )
            _write(fresh / package / "py.typed", "")
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}") from error
    return target


def _check_name(kind: str, name: str) -> None:
    if not NAME.fullmatch(name) or keyword.iskeyword(name):
        raise ConfigError(f"'{name}' cannot name a method: expected {NAME.pattern}, and no word of Python's")
    distribution = canonicalize_name(f"{CORE}-{name}")
    for plugin in plugins():
        if (plugin.kind, plugin.method) == (kind, name):
            raise PluginError(f"{kind} '{name}' is registered by {plugin.provider}; choose another name")
        if canonicalize_name(plugin.distribution) == distribution:
            raise PluginError(f"{plugin.provider} is installed already; choose another name")


def _words(kind: Kind, name: str) -> dict[str, str]:
    """Return what the templates' placeholders stand for."""
    # An editable core's version is the one to build against; the next minor release may change hooks.
    from importlib.metadata import version

    major, minor = version(CORE).split(".")[:2]
    needs = (f"{CORE}>={major}.{minor},<{major}.{int(minor) + 1}", *_NEEDS.get(kind.name, _TORCH))
    camel = "".join(part.capitalize() for part in name.split("_"))
    return {
        "name": name,
        "NAME": name.upper(),
        "Class": camel,
        "kind": kind.name,
        "kind_words": kind.name.replace("_", " "),
        "Suite": f"{kind.base}Suite",
        "package": f"{CORE}_{name}",
        "distribution": f"{CORE}-{name.replace('_', '-')}",
        "dependencies": ", ".join(f'"{need}"' for need in needs),
        "use": _use(kind, name),
    }


def _use(kind: Kind, name: str) -> str:
    """Return the sentence that says how what is written is used."""
    if kind is COMMAND:
        return (
            f"`luthier {name} --help` then shows its options, and `luthier.{name}(config)` runs it in Python."
        )
    choice = f"{kind.group}=[{name}]" if kind.many else f"{kind.group}={name}"
    option = f"{kind.package(name)}.OPTION=VALUE"
    return f"`{choice}` then selects it on the command line, and `{option}` sets an option."


def _filled(template: str, words: dict[str, str]) -> str:
    file = resources.files("luthier_plugins.commands.plugins") / "templates" / f"{template}.template"
    return Template(file.read_text(encoding="utf-8")).substitute(words)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def show_new(kind: str, name: str, folder: Path) -> int:
    """Write the package, print what to do next, and return the exit status."""
    target = new_plugin(kind, name, folder)
    method = target / f"{CORE}_{name}" / f"{name}.py"
    sys.stdout.write(
        f"{method} is a working {kind.replace('_', ' ')}; make it yours. Then:\n\n"
        f"  pip install -e {target}\n"
        f"  pytest {target}\n"
        f"  luthier plugins --load\n"
    )
    return 0
