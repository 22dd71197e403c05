"""What becomes of an example that is longer than the model or the run takes."""

from dataclasses import replace

from luthier.errors import DataError
from luthier.trees.tree import Branch, Tree

OVERFLOW = ("drop", "truncate_left", "truncate_right", "refuse")
UNUSABLE = ("drop", "refuse")
"""What may become of rows that nothing can be learned from."""


def fit(tree: Tree, max_length: int, overflow: str, bos: int | None = None) -> tuple[Tree | None, str]:
    """Return `tree` so that its longest path has at most `max_length` tokens, and what was done to it.

    ``drop`` leaves it out. ``truncate_left`` cuts the start of the prompt, of which at least one token
    stays, and never a completion. ``truncate_right`` cuts the end of the completions.

    Args:
        tree: An example.
        max_length: Longest path, in tokens.
        overflow: One of `OVERFLOW`.
        bos: The token that starts a text, which a cut on the left keeps.

    Returns:
        The tree and a reason, empty where nothing was cut; None for a tree that is left out.

    Raises:
        DataError: It is too long and `overflow` is ``refuse``.
    """
    longest = max((len(branch.ids) for branch in tree.branches), default=0)
    length = len(tree.prompt) + longest
    if length <= max_length:
        return tree, ""
    reason = f"longer than {max_length:,} tokens"
    if overflow == "refuse":
        raise DataError(
            f"{tree.origin}: {length:,} tokens are more than max_length={max_length:,}; "
            "raise max_length, or choose overflow=drop, truncate_left or truncate_right"
        )
    if overflow == "truncate_left":
        first = tree.prompt[:1] if tree.prompt[0] == bos else ()
        room = max_length - longest - len(first)
        if room < 1 - len(first):
            return None, f"{reason} without the prompt"
        rest = tree.prompt[len(tree.prompt) - room :]
        return replace(tree, prompt=first + rest), f"cut on the left to {max_length:,} tokens"
    if overflow == "truncate_right":
        room = max_length - len(tree.prompt)
        if room < 1:
            return None, f"{reason} in the prompt alone"
        branches = tuple(_cut(branch, room) for branch in tree.branches)
        return replace(tree, branches=branches), f"cut on the right to {max_length:,} tokens"
    return None, reason


def _cut(branch: Branch, room: int) -> Branch:
    return Branch(branch.ids[:room], None if branch.scored is None else branch.scored[:room])
