"""What every method is: a frozen dataclass whose fields are its options."""

import dataclasses
from abc import ABC
from collections.abc import Mapping
from typing import Any, ClassVar


class Method(ABC):  # noqa: B024 — the kinds below it are abstract
    """Base of every kind. Subclasses are frozen dataclasses; fields are declared with `option`.

    Attributes:
        source: Paper and section, or the library the method comes from.
        refuses: ``{"kind=name": "what to choose instead"}`` — partners this method cannot be combined with.
            ``"kind=*"`` refuses every method of that kind but ``none``.
    """

    source: ClassVar[str] = ""
    refuses: ClassVar[Mapping[str, str]] = {}


def option(default: Any, help: str) -> Any:
    """Declare an option of a method or of a config: its default and the sentence that documents it.

    The same declaration is the Hydra schema, the help text and the documentation page.
    """
    if isinstance(default, list | dict | set):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def options_of(cls: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    """Return the options of a method class by name: the fields its constructor takes."""
    fields = [field for field in dataclasses.fields(cls) if field.init]
    # Keyword-only ones, which a base class gives to every method of its kind, come after the method's own.
    return {field.name: field for field in sorted(fields, key=lambda field: field.kw_only is True)}
