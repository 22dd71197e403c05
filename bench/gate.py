"""The accuracy gate: how far bf16 moves the log-ratios that preferences are learned from, beside TRL.

h = [log π(chosen) − log π_ref(chosen)] − [log π(rejected) − log π_ref(rejected)], in nats, of every pair,
with an adapter that has moved at random from where it started, its weights the same in both frameworks. Each
computes h in fp32 and in bf16 as it does when it trains; the gate is passed if bf16 moves Luthier's by no
more than TRL's, both on average and at most. With 64 pairs chance alone makes the ratio of the averages 0.87
to 1.13, and that of the largest wider; that of single tokens, of which there are thousands, is firm.
"""

import itertools
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import mean
from typing import Any

from bench.job import Job
from bench.side_by_side import ask

MODULES = {"trl-compact": "bench.peers.trl_log_ratios", "luthier": "bench.contenders.luthier_log_ratios"}
PEER, OURS = MODULES


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of both sides of every pair in nats: chosen, rejected, chosen and so on.

    Attributes:
        contender: Who computed them.
        precision: In what.
        policy: For every side those of its tokens.
        reference: For every side its own, under the reference.
    """

    contender: str
    precision: str
    policy: list[list[float]]
    reference: list[float]

    def tokens(self) -> Iterator[float]:
        """Yield the policy's log-probability of every token."""
        return itertools.chain.from_iterable(self.policy)

    def pairs(self) -> list[float]:
        """Return h of every pair."""
        sides = [sum(tokens) - other for tokens, other in zip(self.policy, self.reference, strict=True)]
        return [chosen - rejected for chosen, rejected in zip(sides[::2], sides[1::2], strict=True)]

    def summary(self) -> dict[str, Any]:
        """Return it with sums in the place of tokens."""
        return {**vars(self), "policy": list(map(sum, self.policy))}


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Attributes:
        facts: Lines for a report.
        passed: Luthier's bf16 is no further from its fp32 than TRL's.
        details: The log-probabilities behind them.
    """

    facts: dict[str, str]
    passed: bool
    details: list[dict[str, Any]]


def distances(ones: Iterable[float], others: Iterable[float]) -> list[float]:
    """Return how far each number is from its fellow."""
    return [abs(one - other) for one, other in zip(ones, others, strict=True)]


def root_mean_square(values: Iterable[float]) -> float:
    """Return the root of the mean of the squares."""
    return math.sqrt(mean(value * value for value in values))


def judge(found: Iterable[Logprobs]) -> Verdict:
    """Compare what both frameworks found in both precisions."""
    by = {(one.contender, one.precision): one for one in found}
    facts: dict[str, str] = {}
    moved: dict[str, tuple[float, ...]] = {}
    for contender in MODULES:
        exact, low = by[contender, "fp32"], by[contender, "bf16"]
        pairs = distances(low.pairs(), exact.pairs())
        token = root_mean_square(distances(low.tokens(), exact.tokens()))
        moved[contender] = mean(pairs), max(pairs), token
        facts[f"gate, {contender}"] = (
            f"|h in bf16 − h in fp32| mean {mean(pairs):.4f}, max {max(pairs):.4f}; "
            f"of a token's log-probability, root mean square {token:.4f}"
        )
    ours, peer = (by[name, "fp32"].pairs() for name in (OURS, PEER))
    facts["gate, h in fp32"] = (
        f"mean |h| {mean(map(abs, ours)):.3f}; {OURS} and {PEER} differ by at most "
        f"{max(distances(ours, peer)):.1e}"
    )
    average, most, token = (one / other for one, other in zip(moved[OURS], moved[PEER], strict=True))
    passed = average <= 1 and most <= 1
    facts["gate"] = (
        f"{'passed' if passed else 'FAILED'} on {len(ours)} pairs: {average:.2f} of {PEER}'s mean, "
        f"{most:.2f} of its maximum; {token:.2f} of what bf16 moves a token by"
    )
    return Verdict(facts, passed, [one.summary() for one in by.values()])


def gate(jobs: Iterable[Job]) -> Verdict | None:
    """Run every job, each in a fresh process, and compare; None if one fails."""
    found = []
    for job in jobs:
        try:
            found.append(Logprobs(**ask(MODULES[job.contender], job)))
        except RuntimeError as error:
            print(f"gate: {job.contender} {job.precision} failed:\n{error}", file=sys.stderr, flush=True)
            return None
        print(f"gate: {job.contender} {job.precision} measured", flush=True)
    return judge(found)
