"""Pairs of a preferred and a rejected completion."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier_toolkits.preference.pair_findings import EQUAL as EQUAL, contradictions as contradictions
    from luthier_toolkits.preference.pair_rows import pair_tree as pair_tree
    from luthier_toolkits.preference.pairs import (
        PairedObjective as PairedObjective,
        PairRows as PairRows,
        Side as Side,
        check_positive as check_positive,
        check_share as check_share,
        log1mexp as log1mexp,
        preference_metrics as preference_metrics,
    )
else:
    __getattr__, __dir__, __all__ = attach(__name__)
