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
            ``"kind=*"`` refuses every method of that kind but none, ``"kind.attribute=value"`` those with a
            class variable of that value: ``"adapter.trains_base=False"``.
        needs_device: ``{"cuda": "what to choose elsewhere"}`` — the one type of device it runs on.
    """

    source: ClassVar[str] = ""
    refuses: ClassVar[Mapping[str, str]] = {}
    needs_device: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def refusal_of(cls, kind: str, name: str, other: type[Any]) -> str | None:
        """Return what to choose instead of the method `name` of `kind`, class `other`; None: it is fine."""
        for partner, advice in cls.refuses.items():
            of, _, wanted = partner.partition("=")
            of, _, attribute = of.partition(".")
            value = str(getattr(other, attribute, None)) if attribute else name
            if of == kind and wanted in ("*", value):
                return advice
        return None


def option(default: Any, help: str, was: str = "") -> Any:
    """Declare an option of a method or of a config: its default and the sentence that documents it.

    The same declaration is the Hydra schema, the help text and the documentation page.

    Args:
        default: Its value where nobody sets it.
        help: One sentence, with the unit.
        was: What it was called before, for the hint to whoever still writes that.
    """
    metadata = {"help": help, "was": was}
    if isinstance(default, list | dict | set):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def options_of(cls: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    """Return the options of a method class by name: the fields its constructor takes."""
    fields = [field for field in dataclasses.fields(cls) if field.init]
    # Keyword-only ones, which a base class gives to every method of its kind, come after the method's own.
    return {field.name: field for field in sorted(fields, key=lambda field: field.kw_only is True)}
