"""Supervised fine-tuning: the negative log-likelihood of the supervised tokens."""

from dataclasses import dataclass
from typing import ClassVar

from luthier import Codec, DataError, Loss, Objective, Pack, Policy, Register, Row, Tree, hookimpl


@dataclass(frozen=True)
class SFT(Objective):
    """Mean token negative log-likelihood, ``−Σ log π(yₜ | y₍<t₎, x) / N``.

    N counts the supervised tokens of the whole optimiser step, over all packs, so neither packing nor
    uneven lengths change the weight of a token. A row has ``prompt`` and ``completion`` (text or messages),
    or ``messages``, of which every assistant turn is supervised.
    """

    source: ClassVar[str] = "Ouyang et al. 2022, arXiv 2203.02155, section 3.5"

    def encode(self, row: Row, codec: Codec) -> Tree:
        """Return a prompt with one completion.

        Raises:
            DataError: The row has neither ``messages`` nor ``prompt`` and ``completion``.
        """
        fields = row.fields
        if fields.get("messages") is not None:
            return codec.conversation(fields["messages"], row.origin)
        if "prompt" in fields and "completion" in fields:
            return codec.pair(fields["prompt"], fields["completion"], row.origin)
        has = ", ".join(fields) or "nothing"
        raise DataError(f"{row.origin}: has {has}; sft expects 'prompt' and 'completion', or 'messages'")

    def loss(self, policy: Policy, pack: Pack) -> Loss:
        """Return the summed negative log-likelihood; its weight is the number of supervised tokens."""
        logprobs = policy.logprobs(pack)
        return Loss(-logprobs.values.sum(), weight=len(logprobs.values))


@hookimpl
def register_objectives(register: Register) -> None:
    """Register `sft`."""
    register("sft", SFT)
