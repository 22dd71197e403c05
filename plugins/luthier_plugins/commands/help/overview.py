"""``luthier --help``: a line for every command. Imports neither torch nor rich."""

import sys
from collections.abc import Iterator

from luthier.errors import visible
from luthier.registry import CORE, commands

USAGE = """\
Luthier fine-tunes and aligns language models; every method and every command is a plugin.

usage: luthier COMMAND [options]

{commands}

  luthier COMMAND --help                   its groups and options, each with its default, and examples
  luthier train recipe=quickstart          a first run, on a model that is a Python package
  luthier plugins new optimiser NAME       a package with a method or a command of your own
  eval "$(luthier completion bash)"        TAB completes commands, groups, choices and options

Environment: LUTHIER_PLUGINS (third-party distributions to load; empty: none), LUTHIER_BLOCKED (ones to
leave out), LUTHIER_CACHE (converted models), LUTHIER_TRACEBACK=1 (whole tracebacks).
"""


def show_overview() -> int:
    """Print it and return the exit status."""
    sys.stdout.write(USAGE.format(commands="\n".join(map(visible, _summaries()))))
    return 0


def _summaries() -> Iterator[str]:
    """Yield a line for every command; third parties' with their package, broken ones with what is wrong."""
    broken = {name.partition(".")[2]: reason for name, reason in commands().broken.items()}
    width = max(map(len, [*commands().names("command"), *broken])) + 1
    for known in sorted(commands().all(), key=lambda known: known.plugin.distribution != CORE):
        by = f"({known.plugin.provider})" if known.plugin.distribution != CORE else ""
        yield f"  {known.name:{width}} {known.cls.summary} {by}".rstrip()
    for name, reason in broken.items():
        yield f"  {name:{width}} cannot be used: {reason}"
