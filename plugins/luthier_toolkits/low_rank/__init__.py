"""Low-rank updates of linear layers."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier_toolkits.low_rank.low_rank import (
        compute_dtype as compute_dtype,
        low_rank_linear as low_rank_linear,
        principal_part as principal_part,
    )
    from luthier_toolkits.low_rank.low_rank_adapter import LowRankAdapter as LowRankAdapter
    from luthier_toolkits.low_rank.low_rank_change import LowRankChange as LowRankChange
    from luthier_toolkits.low_rank.low_rank_parameters import LowRankParameters as LowRankParameters
else:
    __getattr__, __dir__, __all__ = attach(__name__)
