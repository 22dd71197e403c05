"""Finding plugins by entry-point metadata alone: nothing of a plugin is imported here."""

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points, version

from packaging.utils import canonicalize_name

GROUP = "luthier"
CORE = "luthier"


@dataclass(frozen=True)
class Plugin:
    """An entry point of group ``luthier`` and the distribution that brought it."""

    entry: EntryPoint
    distribution: str
    version: str
    requires: tuple[str, ...]

    @property
    def provider(self) -> str:
        """Distribution and version, e.g. ``"luthier-toy 0.2"``."""
        return f"{self.distribution} {self.version}"

    @property
    def kind(self) -> str:
        """The kind the entry point's name announces (``adapter.lora`` → ``adapter``), or ``""``."""
        kind, dot, _ = self.entry.name.partition(".")
        return kind if dot else ""

    @property
    def method(self) -> str:
        """The method the entry point's name announces (``adapter.lora`` → ``lora``)."""
        return self.entry.name.rpartition(".")[2]


def _names(variable: str) -> set[str] | None:
    value = os.environ.get(variable)
    if value is None:
        return None
    return {canonicalize_name(name.strip()) for name in value.split(",") if name.strip()}


def plugins() -> list[Plugin]:
    """Return the installed plugins, sorted by distribution and entry-point name.

    ``LUTHIER_PLUGINS`` limits third parties to a comma-separated list of distributions (empty: built-ins
    only); ``LUTHIER_BLOCKED`` leaves out distributions or single entry points by name.
    """
    allowed, blocked = _names("LUTHIER_PLUGINS"), _names("LUTHIER_BLOCKED") or set()
    selection = []
    for plugin in _installed():
        name, entry = canonicalize_name(plugin.distribution), plugin.entry
        if name in blocked or canonicalize_name(entry.name) in blocked:
            continue
        if allowed is None or name == CORE or name in allowed:
            selection.append(plugin)
    return sorted(
        selection, key=lambda plugin: (plugin.distribution != CORE, plugin.distribution, plugin.entry.name)
    )


def _installed() -> Iterator[Plugin]:
    """Yield the plugins of every distribution, whose metadata is parsed anew each time it is looked at."""
    facts: dict[int, tuple[str, str, tuple[str, ...]] | None] = {}
    for entry in entry_points(group=GROUP):
        if (dist := entry.dist) is None:
            continue
        if id(dist) not in facts:
            # What a half-finished uninstall leaves has no name.
            whole = bool(dist.metadata["Name"])
            facts[id(dist)] = (dist.name, dist.version, tuple(dist.requires or ())) if whole else None
        if (own := facts[id(dist)]) is not None:
            yield Plugin(entry, *own)


@functools.cache
def unmet_core_requirement(requires: tuple[str, ...]) -> str | None:
    """Return the requirement on Luthier that the running version does not meet, if there is one.

    pip checks it at installation; an editable or ``--no-deps`` installation can still break it.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    running = version(CORE)
    for text in requires:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        met = requirement.specifier.contains(running, prereleases=True)
        if canonicalize_name(requirement.name) == CORE and not met:
            return f"needs {text}, but luthier {running} is installed"
    return None
