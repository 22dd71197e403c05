"""Hydra's and OmegaConf's errors, retold in one line with the nearest known name."""

import re
from collections.abc import Mapping, Sequence

from hydra.errors import OverrideParseException

from luthier.errors import ConfigError, LuthierError, PluginError, nearest

UNKNOWN_KEY = re.compile(r"Could not override '([^']+)'")
UNKNOWN_CHOICE = re.compile(r"Could not find '([^']+)/([^'/]+)'(.*)", re.DOTALL)
AVAILABLE = re.compile(r"^\t(\S+)$", re.MULTILINE)
WRONG_TYPE = re.compile(r"Error merging override (\S+)")
FULL_KEY = re.compile(r"full_key: (\S+)")
MANDATORY = re.compile(r"You must specify '([^']+)'")


def explain(error: Exception, known: Sequence[str], broken: Mapping[str, str]) -> LuthierError:
    """Turn `error`, raised while composing, into one line.

    Args:
        error: Hydra's or OmegaConf's exception.
        known: Every key or group an override may name.
        broken: Entry points that did not load, with the reason.
    """
    text = str(error)
    if isinstance(error, OverrideParseException):
        return ConfigError(f"'{error.override}' is no override: {_first_line(error)}")
    if match := UNKNOWN_CHOICE.search(text):
        return _unknown_choice(match[1], match[2], AVAILABLE.findall(match[3]), broken)
    if match := MANDATORY.search(text):
        group = match[1].split("@")[0]
        choices = ", ".join(AVAILABLE.findall(text))
        return ConfigError(f"'{group}' must be chosen, e.g. {group}=NAME; known: {choices}")
    if match := UNKNOWN_KEY.search(text):
        return ConfigError(f"unknown option '{match[1]}': {_near(match[1], known)}")
    if match := WRONG_TYPE.search(text):
        cause = _first_line(error.__cause__ or error)
        return ConfigError(f"{match[1]}: {cause}")
    if match := FULL_KEY.search(text):
        return ConfigError(f"{match[1]}: {_first_line(error)}")
    return ConfigError(_first_line(error))


def _unknown_choice(group: str, name: str, available: list[str], broken: Mapping[str, str]) -> LuthierError:
    for entry, reason in broken.items():
        if entry.split(".")[-1] == name:
            return PluginError(f"{group} '{name}' cannot be used: {reason}")
    hint = nearest(name, available)
    return ConfigError(f"unknown {group} '{name}': {hint}known: {', '.join(sorted(available)) or 'none'}")


def _near(key: str, known: Sequence[str]) -> str:
    group = key.split(".")[0]
    if group.startswith("eval_"):
        return f"choose the held-out rows first: {group.removeprefix('eval_')}@{group}=SOURCE"
    if key in known:
        return f"it is no option of the chosen {group}"
    hint = nearest(key, known) or nearest(key.split(".")[-1], [one.split(".")[-1] for one in known])
    return hint.strip() or "see --help for what can be set"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
