"""``luthier COMMAND --help``: its groups with what is chosen, recipes, options with defaults, examples."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from luthier import config
from luthier.commands import parsed
from luthier.contracts import KINDS, Command, Kind
from luthier.registry import catalogue, command, composed_commands, presets
from luthier_plugins.commands.help.options import grid, options
from luthier_toolkits.terminal import SafeConsole, shown

ORDER = ("data", "adapter", "quantiser", "objective", "reward_model", "optimiser", "merger", "selector")
"""In which order people need the groups: data, method, rate; the others follow."""


def show_usage(name: str, choices: Sequence[str]) -> int:
    """Print the help of the command `name` and of the methods chosen for it; return the exit status.

    Args:
        name: A command.
        choices: Overrides; those that choose methods show the options of these.

    Raises:
        PluginError: There is no such command or method.
    """
    of = command(name)
    if not of.composed:
        return int(of.run(["--help"]) or 0)
    line = parsed(name, of, choices)
    console = SafeConsole()
    console.print(f"{_paragraphs(of.options)}\n\nusage: luthier {name} {escape(' '.join(_words(of)))}\n")
    console.print(grid(_flags(of)))
    chosen = _chosen(of, line.overrides)
    if kinds := _kinds(of):
        config.prepare()
        console.print("\n[bold]groups[/], ← what is chosen")
        console.print(grid(_groups(of, kinds, chosen, line.sources())))
        _show_recipes(console, of, line.sources())
        _show_methods(console, kinds, chosen)
    _show_options(console, of)
    if of.examples:
        console.print("\n[bold]examples[/]")
        console.print("\n".join(f"  luthier {escape(line)}" for line in of.examples), soft_wrap=True)
    return 0


def _paragraphs(cls: type[Any]) -> str:
    # Paragraphs, so that the terminal breaks the lines.
    said = inspect.getdoc(cls) or ""
    return "\n\n".join(escape(" ".join(part.split())) for part in said.split("\n\n"))


def _words(of: Command) -> Iterator[str]:
    for place in of.positionals:
        yield "…" if place is ... else f"[{str(place).rpartition('.')[2].upper()}]"
    yield "[GROUP=CHOICE …] [OPTION=VALUE …]" if _kinds(of) else "[OPTION=VALUE …]"


def _flags(of: Command) -> Iterator[tuple[str, str]]:
    if of.single is None:
        yield "-m", "one run for each combination of the values: OPTION=A,B"
    yield "--cfg job", "print the composed config and run nothing"
    yield "FILE.yaml", "options and a defaults list of your own, or the config.yaml of a run"
    yield "--config-dir FOLDER", "presets and recipes of your own, beside the built-in ones"


def _kinds(of: Command) -> list[Kind]:
    """Return the kinds that the command takes methods of, in the order in which people need them."""
    fields = {field.name for field in dataclasses.fields(of.options)}
    kinds = [kind for kind in KINDS.values() if {kind.group, f"{kind.group}s"} & fields]
    return sorted(kinds, key=lambda kind: ORDER.index(kind.group) if kind.group in ORDER else len(ORDER))


def _chosen(of: Command, choices: Sequence[str]) -> dict[str, list[str]]:
    """Return what is chosen of every group: by `choices`, else by default."""
    chosen = dict(of.defaults)
    chosen |= dict(choice.lstrip("+").split("=", 1) for choice in choices if "=" in choice)
    texts = {group: ",".join(value) if isinstance(value, list) else value for group, value in chosen.items()}
    return {group: text.strip("[]").split(",") for group, text in texts.items() if text not in (None, "???")}


def _groups(
    of: Command, kinds: Sequence[Kind], chosen: dict[str, list[str]], folders: Sequence[Path]
) -> Iterator[tuple[str, str]]:
    fields = {field.name for field in dataclasses.fields(of.options)}
    for kind in kinds:
        names = [*catalogue().names(kind.name), *presets(kind.group, folders=folders)]
        own = chosen.get(kind.group, [])
        marked = [f"[bold]{shown(name)}[/] ←" if name in own else shown(name) for name in names]
        yield kind.group, ", ".join(marked) or "none"
        if kind.group == "data":
            if "eval_data" in fields:
                yield "data@eval_data", "the held-out rows, from any source of data"
            if "model" in of.defaults and (models := presets("model", folders=folders)):
                yield "model", shown(", ".join(models))


def _show_recipes(console: Console, of: Command, folders: Sequence[Path]) -> None:
    # Recipes are for training.
    fields = {field.name for field in dataclasses.fields(of.options)}
    if "recipe" in of.defaults and "adapter" in fields:
        console.print("\n[bold]recipes[/], recipe=NAME")
        names = presets("recipe", folders=folders)
        console.print(
            grid((shown(name), escape(_sentence(f"recipe/{name}.yaml", folders))) for name in names)
        )


def _sentence(preset: str, folders: Sequence[Path]) -> str:
    """Return the first sentence of the comment that a preset begins with."""
    packages = [resources.files(package) for package in ("luthier_conf", *catalogue().config_packages)]
    for place in (*packages, *folders):
        file = place.joinpath(*preset.split("/"))
        if file.is_file():
            lines = file.read_text(encoding="utf-8").replace("# @package _global_\n", "").splitlines()
            comment = [line[2:] for line in itertools.takewhile(lambda line: line.startswith("# "), lines)]
            return re.split(r"(?<=[.]) (?=[A-Z])", " ".join(comment))[0]
    return ""


def _show_methods(console: Console, kinds: Sequence[Kind], chosen: dict[str, list[str]]) -> None:
    """Show the options of every chosen method; of several of a kind, as trackers, those with options."""
    for kind in kinds:
        for name in (name for name in chosen.get(kind.group, []) if name and name not in presets(kind.group)):
            cls = catalogue().find(kind.name, name).cls
            if rows := list(options(cls, f"{kind.package(name)}.")):
                console.print(f"\n[bold]{kind.group}={name}[/]  {_paragraphs(cls)}")
                console.print(grid(rows))


def _show_options(console: Console, of: Command) -> None:
    # A command that takes another's options names them after its own.
    parents = [name for name in composed_commands() if command(name).options is of.options.__base__]
    inherited = dataclasses.fields(command(parents[0]).options) if parents else ()
    console.print("\n[bold]options[/]")
    console.print(grid(options(of.options, leave_out={field.name for field in inherited})))
    if parents:
        console.print(f"\n[bold]options of {parents[0]}[/]")
        console.print(grid(options(command(parents[0]).options)))
