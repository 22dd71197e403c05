"""Supervised fine-tuning: the negative log-likelihood of the supervised tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from luthier import (
    Codec,
    DataError,
    Loss,
    Objective,
    Pack,
    Policy,
    Register,
    Row,
    Supervise,
    Tree,
    hookimpl,
    option,
)


@dataclass(frozen=True)
class SFT(Objective):
    """Mean token negative log-likelihood, ``−Σ log π(yₜ | y₍<t₎, x) / N``.

    N counts the supervised tokens of the whole optimiser step, over all packs, so neither packing nor
    uneven lengths change the weight of a token. A row has ``prompt`` and ``completion`` (text or messages),
    ``messages``, of which `supervise` says what is trained, or ``text``, of which all is.
    """

    source: ClassVar[str] = "Ouyang et al. 2022, arXiv 2203.02155, section 3.5"

    supervise: Supervise = option(
        "assistant",
        "What is trained: the assistant turns, the last, all tokens but the first, or each assistant turn "
        "in a tree of its own, rendered as it is answered (taken by itself where a template rewrites turns).",
    )

    def encode(self, row: Row, codec: Codec) -> Sequence[Tree]:
        """Return a prompt with one completion, or one for each assistant turn.

        Raises:
            DataError: The row has neither ``messages``, nor ``prompt`` and ``completion``, nor ``text``.
        """
        fields = {name: value for name, value in row.fields.items() if value is not None}
        tools = fields.get("tools")
        if "messages" in fields:
            return codec.trees(fields["messages"], row.origin, self.supervise, tools)
        if "prompt" in fields and "completion" in fields:
            return codec.pairs(fields["prompt"], fields["completion"], row.origin, self.supervise, tools)
        if "text" in fields:
            return [codec.document(fields["text"], row.origin)]
        has = ", ".join(fields) or "nothing"
        raise DataError(
            f"{row.origin}: has {has}; sft expects 'prompt' and 'completion', 'messages' or 'text'; "
            "rename with data.columns, e.g. data.columns.prompt=NAME"
        )

    def loss(self, policy: Policy, pack: Pack) -> Loss:
        """Return the summed negative log-likelihood; its weight is the number of supervised tokens."""
        logprobs = policy.logprobs(pack)
        return Loss(-logprobs.values.sum(), weight=len(logprobs.values))

    def weigh(self, tree: Tree) -> float:
        """Return the number of supervised tokens."""
        return float(tree.scored_tokens)


@hookimpl
def register_objectives(register: Register) -> None:
    """Register `sft`."""
    register("sft", SFT)
