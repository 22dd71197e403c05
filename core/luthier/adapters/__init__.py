"""Wrapped linear layers, their targets, PEFT folders, several adapters on one base."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier.adapters.adapted_module import (
        ParameterChange as ParameterChange,
        adapted_modules as adapted_modules,
        base_of as base_of,
        change as change,
        settle as settle,
    )
    from luthier.adapters.continuation import continued_adapter as continued_adapter
    from luthier.adapters.linear_adapter import (
        AdaptedLinear as AdaptedLinear,
        LinearAdapter as LinearAdapter,
        adapted as adapted,
        adapted_layers as adapted_layers,
        adapter_off as adapter_off,
        fold as fold,
        linear_shape as linear_shape,
        peft_targets as peft_targets,
        replace as replace,
        weight_in_use as weight_in_use,
        weight_of as weight_of,
        write_weight as write_weight,
    )
    from luthier.adapters.peft_changes import train_tokens as train_tokens
    from luthier.adapters.peft_folder import (
        CONFIG as CONFIG,
        PREFIX as PREFIX,
        WEIGHTS as WEIGHTS,
        PeftAdapter as PeftAdapter,
        SavedAdapter as SavedAdapter,
        load_adapter as load_adapter,
        read_adapter as read_adapter,
    )
    from luthier.adapters.targets import (
        ALL_LINEAR as ALL_LINEAR,
        matches as matches,
        select as select,
        value_for as value_for,
    )
else:
    __getattr__, __dir__, __all__ = attach(__name__)
