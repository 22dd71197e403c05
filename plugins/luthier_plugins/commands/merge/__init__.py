"""The command `merge`: several models or adapters as one, in bounded memory."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier_plugins.commands.merge.io.shard_writer import (
        ShardWriter as ShardWriter,
        lay_out as lay_out,
        write_index as write_index,
    )
    from luthier_plugins.commands.merge.report.result import MergeReport as MergeReport
    from luthier_plugins.commands.merge.run.merging import merge as merge
else:
    __getattr__, __dir__, __all__ = attach(__name__)
