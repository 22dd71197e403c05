"""From rows to trees to batches."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier.data.batches import Batches as Batches, RowBatches as RowBatches
    from luthier.data.data import Encoded as Encoded, encode as encode, read as read
    from luthier.data.formats import asked as asked
    from luthier.data.run_data import (
        RunRows as RunRows,
        source_rows as source_rows,
        training_rows as training_rows,
    )
    from luthier.data.sampler import Sampler as Sampler
    from luthier.data.training_order import (
        sampler_of as sampler_of,
        seen_trees as seen_trees,
        steps_of as steps_of,
    )
else:
    __getattr__, __dir__, __all__ = attach(__name__)
