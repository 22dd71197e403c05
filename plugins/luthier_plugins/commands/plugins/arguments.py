"""The arguments of `plugins`, which takes no config."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from luthier.contracts import ALL_KINDS
from luthier.errors import LuthierError
from luthier_plugins.commands.plugins.listing import show_loaded, show_metadata
from luthier_plugins.commands.plugins.scaffold import show_new


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise LuthierError(f"{message} (see {self.prog} --help)")


def run(arguments: list[str]) -> int:
    """List what is installed, or write a package, as `arguments` say; return the exit status."""
    parser = _Parser(prog="luthier plugins", description="List the installed plugins, from package metadata.")
    parser.add_argument(
        "--load", action="store_true", help="import them too and say which are broken (slower)"
    )
    new = parser.add_subparsers(metavar="COMMAND", title="commands").add_parser(
        "new", help="write a plugin package that works: new KIND NAME"
    )
    new.add_argument("kind", metavar="KIND", help=f"one of {', '.join(ALL_KINDS)}")
    new.add_argument("name", metavar="NAME", help="the method's name, in lower case")
    new.add_argument("--folder", type=Path, default=Path(), help="where luthier-NAME is put (here)")
    options = parser.parse_args(arguments)
    if "kind" in options:
        return show_new(options.kind, options.name, options.folder)
    return show_loaded() if options.load else show_metadata()
