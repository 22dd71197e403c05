"""An example and its packs: the tree of token segments, its layout, its store, its truncation."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier.trees.layout import Segment as Segment, Tile as Tile, TreeSpans as TreeSpans
    from luthier.trees.tree import Branch as Branch, Pack as Pack, Tree as Tree, cut as cut
    from luthier.trees.tree_store import TreeStore as TreeStore
    from luthier.trees.truncation import OVERFLOW as OVERFLOW, UNUSABLE as UNUSABLE, fit as fit
else:
    __getattr__, __dir__, __all__ = attach(__name__)
