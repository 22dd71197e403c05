"""The kinds of method that a plugin can register, and commands. Importing it does not import torch."""

import pkgutil
import re
from dataclasses import dataclass

NAME = re.compile(r"[a-z][a-z0-9_]*")
"""What a method may be called."""


@dataclass(frozen=True)
class Kind:
    """One kind of method, whose base class and registration hook have its name.

    Attributes:
        name: Singular name, as in entry points (``adapter.lora``) and messages.
        group: Hydra config group that selects a method of this kind; empty for commands.
        many: Several can be active in one run (``tracker=[progress,metrics]``),
            each under ``<group>s.<name>``.
    """

    name: str
    group: str
    many: bool = False

    @property
    def hook(self) -> str:
        """The registration hook, e.g. ``register_reward_models``."""
        return f"register_{self.name}s"

    @property
    def base(self) -> str:
        """The name of the class that every method of the kind inherits, e.g. ``RewardModel``."""
        return "".join(part.capitalize() for part in self.name.split("_"))

    def base_class(self) -> type:
        """Import and return the base class."""
        return pkgutil.resolve_name(f"luthier.contracts.{self.name}:{self.base}")  # type: ignore[no-any-return]

    def package(self, method: str) -> str:
        """Return where the config of `method` sits in the composed config."""
        return f"{self.group}s.{method}" if self.many else self.group


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("adapter", "adapter"),
        Kind("quantiser", "quantiser"),
        Kind("optimiser", "optimiser"),
        Kind("objective", "objective"),
        Kind("reward_model", "reward_model", many=True),
        Kind("selector", "selector"),
        Kind("merger", "merger"),
        Kind("data_source", "data"),
        Kind("row_filter", "row_filter", many=True),
        Kind("tracker", "tracker", many=True),
    )
}
"""The kinds of which a run chooses."""
COMMAND = Kind("command", "")
ALL_KINDS = {**KINDS, COMMAND.name: COMMAND}
"""All that a plugin can register."""
