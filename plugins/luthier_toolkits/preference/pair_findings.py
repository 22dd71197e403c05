"""What a person should know of preference pairs before training on them."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.contracts import Finding
from luthier.policy import keys_of
from luthier.trees import Tree

EQUAL = "with chosen equal to rejected"
"""Why a pair says nothing."""
NAMED = 3
"""Rows that a finding names."""
BIASED = 0.6
"""Share of pairs whose chosen side is the longer one from which that is worth saying: chance is a half."""


def pair_findings(trees: Sequence[Tree]) -> list[Finding]:
    """Return contradictions among `trees`, pairs all of them, and how often the longer side is preferred."""
    seen: dict[int, int] = {}
    against: list[str] = []
    longer = shorter = 0
    tokens = [0, 0]
    for place, tree in enumerate(trees):
        chosen, rejected = keys_of(tree)
        seen.setdefault(hash((chosen, rejected)), place)
        if (other := seen.get(hash((rejected, chosen)))) is not None:
            against.append(f"{trees[other].origin} and {tree.origin}")
        lengths = [len(branch.scored_places) for branch in tree.branches]
        longer, shorter = longer + (lengths[0] > lengths[1]), shorter + (lengths[0] < lengths[1])
        tokens = [total + length for total, length in zip(tokens, lengths, strict=True)]
    findings = []
    if against:
        findings.append(contradictions(against))
    if trees:
        share = (longer + (len(trees) - longer - shorter) / 2) / len(trees)
        means = [total / len(trees) for total in tokens]
        findings.append(Finding(_length(share, means)))
    return findings


def contradictions(against: Sequence[str]) -> Finding:
    """Return the finding that the rows named in pairs by `against` contradict each other."""
    more = f" and {len(against) - NAMED:,} more" if len(against) > NAMED else ""
    count = f"{len(against):,} contradiction" + "s" * (len(against) > 1)
    return Finding(f"{count} between rows: {', '.join(against[:NAMED])}{more}", True)


def _length(share: float, means: Sequence[float]) -> str:
    sizes = f"{means[0]:.0f} against {means[1]:.0f} tokens"
    message = f"chosen is the longer side in {share:.0%} of the pairs ({sizes})"
    if max(share, 1 - share) < BIASED:
        return message
    which = "longer" if share > 0.5 else "shorter"
    return f"{message}: taking the {which} side is right in {max(share, 1 - share):.0%} of them"
