"""The suite of commands."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any, ClassVar

from omegaconf import OmegaConf

from luthier.contracts import KINDS, Command, options_of
from luthier.registry import catalogue
from luthier.testing.suite import Suite

WIDEST = 100
"""Characters of a summary: a line of the help."""


class CommandSuite(Suite):
    """What a `luthier.Command` promises."""

    method: ClassVar[type[Command]]
    needs_source: ClassVar[bool] = False

    def test_its_summary_is_a_line(self) -> None:
        """`luthier --help` has a line for every command."""
        summary = self.method.summary
        assert summary.strip(), "summary is empty"
        assert "\n" not in summary, "summary has several lines"
        assert len(summary) <= WIDEST, f"summary has {len(summary)} characters: at most {WIDEST}"

    def test_its_module_imports_no_torch(self) -> None:
        """The module that registers a command is imported for every help: it imports no torch."""
        module = self.method.__module__
        code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{module} imports torch: import it inside run; {done.stderr}"

    def test_its_options_describe_themselves(self) -> None:
        """A command that is composed has options, a dataclass; each says what it does."""
        if not self.method.composed:
            assert not dataclasses.is_dataclass(self.method.options), (
                "nothing is composed: options are not read"
            )
            return
        assert dataclasses.is_dataclass(self.method.options), "options must be a dataclass"
        assert (self.method.options.__doc__ or "").strip(), (
            "options need a docstring: it is the help people see"
        )
        groups = {name for kind in KINDS.values() for name in (kind.group, f"{kind.group}s", "eval_data")}
        for field in dataclasses.fields(self.method.options):
            of_group = field.name in groups or dataclasses.is_dataclass(field.default_factory)
            assert of_group or field.metadata.get("help"), f"{field.name} needs help: option(default, '…')"

    def test_its_positionals_are_options(self) -> None:
        """Bare words fill options that are there; only the last one takes many."""
        places = self.method.positionals
        assert ... not in places[:-1], "only the last one may take many words"
        plain = OmegaConf.to_container(OmegaConf.structured(self.method.options)) if places else {}
        of_methods = {
            f"{KINDS[method.kind].package(method.name)}.{key}"
            for method in catalogue().all()
            for key in options_of(method.cls)
        }
        for place in (place for place in places if isinstance(place, str)):
            holder: Any = plain
            for part in place.split(".") if place not in of_methods else ():
                assert part in holder, f"positional '{place}' is no option"
                holder = holder[part]
