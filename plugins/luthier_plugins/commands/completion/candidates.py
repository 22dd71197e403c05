"""What a word of a command line may become: from entry points, presets and options of commands; no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from luthier.contracts import KINDS, Command
from luthier.registry import command, command_names, plugins, presets

FLAGS = ("--help", "--version", "-m", "--multirun", "--cfg", "--cfg=job", "--config-dir", "--config-dir=",
         "--package", "--resolve")  # fmt: skip
SHOWN = ("job", "hydra", "all")
"""What ``--cfg`` prints."""


def candidates(line: str) -> list[str]:
    """Return what the last word of `line`, which begins with ``luthier``, may become, sorted."""
    *before, word = line.split(" ")
    words = [known for known in before[1:] if known]
    return sorted(candidate for candidate in _all(words, word) if candidate.startswith(word))


def _all(words: list[str], word: str) -> Iterator[str]:
    if not words:
        yield from (*command_names(), "--help", "--version")
    elif words[0] in command_names():
        chosen = command(words[0])
        if not chosen.composed:
            yield from () if len(words) > 1 else chosen.subcommands
            return
        if words[-1] in ("-c", "--cfg"):
            yield from SHOWN
            return
        if words[-1] in ("-cd", "--config-dir", "-p", "--package"):
            return  # files are the shell's to complete
        group, is_value, _ = word.partition("=")
        if group == "--cfg":
            yield from (f"--cfg={shown}" for shown in SHOWN)
        if is_value:
            yield from (f"{group}={choice}" for choice in _choices(chosen, group))
            return
        yield from FLAGS
        yield from (f"{name}=" for name in (*_groups(chosen), *_options(chosen.options)))


def _groups(of: Command) -> list[str]:
    """Return the groups that a command has a choice of."""
    fields = {field.name for field in dataclasses.fields(of.options)}
    kinds = [kind.group for kind in KINDS.values() if {kind.group, f"{kind.group}s"} & fields]
    return [*kinds, *(group for group in of.defaults if group not in kinds)]


def _options(options: type[Any], prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(options):
        if field.metadata.get("help"):
            yield f"{prefix}{field.name}"
        elif isinstance(field.default_factory, type) and dataclasses.is_dataclass(field.default_factory):
            yield from _options(field.default_factory, f"{prefix}{field.name}.")


def _choices(of: Command, group: str) -> Iterator[str]:
    """Yield the methods and built-in presets of a group, or the values of an option that is a switch."""
    group = group.partition("@")[0]
    kind = next((kind for kind in KINDS.values() if kind.group == group), None)
    if kind:
        yield from (plugin.method for plugin in plugins() if plugin.kind == kind.name)
    if kind or group in of.defaults:
        yield from presets(group, ())  # those of plugins are known once torch is imported
    if any(field.name == group and field.type in (bool, "bool") for field in dataclasses.fields(of.options)):
        yield from ("true", "false")
