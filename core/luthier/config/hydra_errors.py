"""Hydra's and OmegaConf's errors, retold in one line with the nearest known name."""

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from yaml import MarkedYAMLError  # type: ignore[import-untyped]

from luthier.config.renamed import new_name
from luthier.contracts import KINDS
from luthier.errors import ConfigError, LuthierError, PluginError, nearest
from luthier.registry import catalogue, presets

UNKNOWN_KEY = re.compile(r"Could not override '([^']+)'")
UNKNOWN_CHOICE = re.compile(r"Could not find '([^']+)/([^'/]+)'(.*)", re.DOTALL)
AVAILABLE = re.compile(r"^\t(\S+)$", re.MULTILINE)
WRONG_TYPE = re.compile(r"Error merging override (\S+)")
FULL_KEY = re.compile(r"full_key: (\S+)")
UNLOADABLE = re.compile(r"Could not load '([^']+)/([^'/]+)'")
AMBIGUOUS = re.compile(r"Ambiguous value for argument '([^']+)'")
TWICE = re.compile(r"Multiple values for (\S+)\.")
FORM = "expected OPTION=VALUE; a VALUE with = or brackets inside needs quotes of its own: 'OPTION=\"a=b\"'"
PRIMARY = "the command"
"""What the primary config is called."""
IN_FILE = re.compile(r"In '([^']+)': (\w+ raised while composing config:\n)?")
UNREAD = re.compile(r"Key '[^']+' not in '\w+'\s+full_key: (\S+)")
MISSING = re.compile(r"Missing mandatory value: (\S+)")
SYNONYMS = Path(__file__).with_name("synonyms.json")
"""What PEFT, TRL, transformers and Axolotl call it → what it is called here; for suggestions alone."""
MANDATORY = re.compile(r"You must specify '([^']+)'")


def check_overrides(overrides: Iterable[str]) -> None:
    """Refuse overrides that Hydra would meet with a traceback.

    Raises:
        ConfigError: One names no option, or chooses a method by what cannot be a name.
    """
    groups = {kind.group for kind in KINDS.values()}
    for override in overrides:
        try:
            parsed = OverridesParser.create().parse_override(override)
            if not parsed.key_or_group:
                raise HydraException("it names nothing")
        except HydraException as error:
            raise ConfigError(f"'{override}' is no override: {FORM}") from error
        if parsed.key_or_group == "run_dir" and parsed.is_sweep_override():
            raise ConfigError(f"{override}: a multirun has one run_dir, with a folder for every run in it")
        chooses = parsed.key_or_group in groups and not parsed.is_delete() and not parsed.is_sweep_override()
        if chooses and (not isinstance(parsed.value(), str | list) or parsed.value() == ""):
            known = ", ".join(_choices(parsed.key_or_group))
            raise ConfigError(f"{override}: expected the name of one of {known}")


def explain(error: Exception, known: Sequence[str], file: object = None) -> LuthierError:
    """Turn `error`, raised while composing, into one line.

    Args:
        error: Hydra's, OmegaConf's or YAML's exception.
        known: Every key or group an override may name.
        file: One's own, which is composed as the primary config.
    """
    if isinstance(error, MarkedYAMLError) and (mark := error.problem_mark):
        return ConfigError(f"{mark.name}:{mark.line + 1}: {error.problem}")
    text = str(error)
    if isinstance(error, UnicodeDecodeError):
        return ConfigError(f"{file or 'a config'} is no text in UTF-8: {text}")
    if match := IN_FILE.match(text):
        where = file if match[1] == PRIMARY else match[1]
        cause = UNREAD.sub(r"Could not override '\1'", text[match.end() :])
        told = explain(type(error)(cause), known)
        return type(told)(f"{where}: {told}" if where else str(told))
    if match := UNKNOWN_CHOICE.search(text):
        return _unknown_choice(match[1], match[2], AVAILABLE.findall(match[3]))
    if match := UNLOADABLE.search(text):
        return _unknown_choice(match[1], match[2], _choices(match[1]))
    if match := AMBIGUOUS.search(text):
        return ConfigError(f"{match[1]}: several values need -m, a run for each; a list is written [a,b]")
    if match := TWICE.search(text):
        return ConfigError(f"{match[1]} is chosen already: write {match[1]}=NAME without the +")
    if match := MANDATORY.search(text):
        group = match[1].split("@")[0]
        choices = ", ".join(AVAILABLE.findall(text))
        return ConfigError(f"'{group}' must be chosen, e.g. {group}=NAME; known: {choices}")
    if match := UNKNOWN_KEY.search(text):
        return ConfigError(f"unknown option '{match[1]}': {_near(match[1], known)}")
    if match := MISSING.search(text):
        return ConfigError(f"{match[1]} must be set: {match[1]}=VALUE")
    if match := WRONG_TYPE.search(text) or FULL_KEY.search(text):
        below = error.__cause__ if match.re is WRONG_TYPE else None
        return ConfigError(f"{match[1]}: {_first_line(below or error)}")
    return ConfigError(_first_line(error))


def _choices(group: str) -> list[str]:
    methods = [
        name for kind in KINDS.values() if kind.group == group for name in catalogue().names(kind.name)
    ]
    return sorted({*methods, *presets(group)})


def _unknown_choice(group: str, name: str, available: list[str]) -> LuthierError:
    for entry, reason in catalogue().broken.items():
        if entry.split(".")[-1] == name:
            return PluginError(f"{group} '{name}' cannot be used: {reason}")
    hint = nearest(name, available)
    if group.startswith("hydra/"):
        hint += f"a package brings it, e.g. pip install hydra-{name.split('_')[0]}-{group.split('/')[1]}; "
    return ConfigError(f"unknown {group} '{name}': {hint}known: {', '.join(sorted(available)) or 'none'}")


def _near(key: str, known: Sequence[str]) -> str:
    """Return what to write instead of an option that there is not, or not of what is chosen."""
    group, _, last = key.rpartition(".")
    group = (group or key).split(".")[0]
    if (new := new_name(key)) and key not in known:
        return f"did you mean '{new}'?"
    if group.startswith("eval_"):
        return f"choose the held-out rows first: {group.removeprefix('eval_')}@{group}=SOURCE"
    if group == "recipe":
        return "a recipe begins with the line '# @package _global_'"
    if key in known:
        return f"it is no option of the chosen {group}" if "." in key else f"this command has no {key}"
    meant = json.loads(SYNONYMS.read_text(encoding="utf-8")).get(last, "")
    if group in known and not meant.startswith(group) and (hint := nearest(key, known)):
        return hint.strip()
    same = sorted({option for option in known if option.endswith(f".{last}")})[:3]
    if meant or same:
        return f"did you mean {' or '.join(map(repr, [meant] if meant else same))}?"
    ends = {option.rpartition(".")[2]: option for option in reversed(known)}
    close = [ends[end] for end in difflib.get_close_matches(last, ends, n=1)]
    hint = nearest(key, known) or nearest("".join(close), close)
    return hint.strip() or "see --help for what can be set"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
