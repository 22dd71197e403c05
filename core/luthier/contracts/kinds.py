"""The kinds of method a plugin can register. Importing this module does not import torch."""

import pkgutil
import re
from dataclasses import dataclass

NAME = re.compile(r"[a-z][a-z0-9_]*")
"""What a method may be called."""


@dataclass(frozen=True)
class Kind:
    """One kind of method.

    Attributes:
        name: Singular name, as in entry points (``adapter.lora``) and messages.
        group: Hydra config group that selects a method of this kind.
        hook: The registration hook.
        base: ``module:class`` every method of the kind inherits.
        many: Several can be active in one run (``tracker=[progress,metrics]``),
            each under ``<group>s.<name>``.
    """

    name: str
    group: str
    hook: str
    base: str
    many: bool = False

    def base_class(self) -> type:
        """Import and return the base class."""
        base = pkgutil.resolve_name(self.base)
        assert isinstance(base, type)
        return base

    def package(self, method: str) -> str:
        """Return where the config of `method` sits in the composed config."""
        return f"{self.group}s.{method}" if self.many else self.group


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("adapter", "adapter", "register_adapters", "luthier.contracts.adapter:Adapter"),
        Kind("quantiser", "quantiser", "register_quantisers", "luthier.contracts.quantiser:Quantiser"),
        Kind("optimiser", "optimiser", "register_optimisers", "luthier.contracts.optimiser:Optimiser"),
        Kind("objective", "objective", "register_objectives", "luthier.contracts.objective:Objective"),
        Kind(
            "reward_model",
            "reward_model",
            "register_reward_models",
            "luthier.contracts.reward_model:RewardModel",
            many=True,
        ),
        Kind("selector", "selector", "register_selectors", "luthier.contracts.selector:Selector"),
        Kind("merger", "merger", "register_mergers", "luthier.contracts.merger:Merger"),
        Kind("data_source", "data", "register_data_sources", "luthier.contracts.data_source:DataSource"),
        Kind(
            "row_filter",
            "row_filter",
            "register_row_filters",
            "luthier.contracts.row_filter:RowFilter",
            many=True,
        ),
        Kind("tracker", "tracker", "register_trackers", "luthier.contracts.tracker:Tracker", many=True),
    )
}
