"""The policy: a causal language model as objectives see it."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from luthier.errors import LuthierError, ModelError
from luthier.models import ScoreHead, head_of
from luthier.policy.attention import use_native
from luthier.policy.forward import Forward, PaddedForward, PaddedLogits, TreeForward
from luthier.policy.head import Head
from luthier.policy.references import References
from luthier.trees import Branch, Pack, Tree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("luthier")

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}
"""How far a token's log-probability may stray between two orders of the same sums."""


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of a pack's scored tokens.

    Attributes:
        values: (N,) float32.
        offsets: C + 1 host integers; child c owns ``values[offsets[c]:offsets[c + 1]]``.
    """

    values: torch.Tensor
    offsets: tuple[int, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Scored tokens of each of the C children."""
        return tuple(stop - start for start, stop in zip(self.offsets, self.offsets[1:], strict=False))

    def sums(self) -> torch.Tensor:
        """Return (C,), the log-probability of each child; 0 where nothing is scored."""
        if len(self.offsets) == 1:
            return self.values
        return torch.stack([part.sum() for part in torch.split(self.values, list(self.lengths))])

    def children(self, of: Sequence[int]) -> Logprobs:
        """Return those of the children numbered `of` alone, in that order."""
        parts = torch.split(self.values, list(self.lengths))
        offsets = itertools.accumulate((self.lengths[child] for child in of), initial=0)
        return Logprobs(torch.cat([parts[child] for child in of]), tuple(offsets))

    def means(self) -> torch.Tensor:
        """Return (C,), each child's mean over its scored tokens; 0 where nothing is scored."""
        lengths = torch.tensor([max(1, length) for length in self.lengths], device=self.values.device)
        return self.sums() / lengths


class Policy:
    """A transformers causal language model that answers with log-probabilities and hidden states of packs.

    The model is switched to tree attention and stays so, as gradient checkpointing calls it again in the
    backward pass; plain forwards and `generate` belong inside `native_attention`.
    """

    def __init__(self, model: PreTrainedModel, *, autocast_dtype: torch.dtype | None = None) -> None:
        self.model = model
        self.autocast_dtype = autocast_dtype
        # A sharded model must be called inside its outermost module: see `luthier.system.processes`.
        self.route: Callable[[Callable[[], Any]], Any] = _here
        self.references: References | None = None
        self._forward = self._candidates()[0]
        with contextlib.suppress(ModelError):  # `check` says it, and what to do instead
            self._forward.attach()

    @property
    def device(self) -> torch.device:
        """Where packs must be."""
        device: torch.device = self.model.device
        return device

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the context in which the model runs: autocast, or nothing."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def logprobs(self, pack: Pack) -> Logprobs:
        """Return the log-probabilities of the pack's scored tokens, differentiable."""
        with self.autocast():
            return Logprobs(self.route(lambda: self._forward.logprobs(pack)), pack.offsets)

    def hidden(self, pack: Pack, positions: torch.Tensor) -> torch.Tensor:
        """Return (n, d), the last hidden states at `positions` (n,) of the pack's row; differentiable."""
        with self.autocast():
            hidden: torch.Tensor = self.route(lambda: self._forward.hidden(pack, positions))
            return hidden

    def scores(self, pack: Pack, positions: torch.Tensor) -> torch.Tensor:
        """Return (n,) float32, what the model's score head makes of the hidden states at `positions` (n,).

        Raises:
            LuthierError: The model has no head.
        """
        head = self._score_head()
        with self.autocast():
            scores: torch.Tensor = self.route(lambda: head(self._forward.hidden(pack, positions)))
            return scores

    def valued(self, pack: Pack) -> tuple[Logprobs, torch.Tensor]:
        """Return the log-probabilities of the scored tokens, and (N,) float32, a value before each of them.

        A value is what the head makes of the hidden state that predicts the token. One forward pass.

        Raises:
            LuthierError: The model has no head.
        """
        head = self._score_head()

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            logprobs, hidden = self._forward.both(pack)
            return logprobs, head(hidden)

        with self.autocast():
            logprobs, scores = self.route(run)
            return Logprobs(logprobs, pack.offsets), scores

    def _score_head(self) -> ScoreHead:
        head = head_of(self.model)
        if head is None:
            raise LuthierError("the model has no score head: an objective that asks for scores sets head")
        return head

    def reference(self, pack: Pack) -> torch.Tensor:
        """Return (C,) float32, the log-probability of each child under the reference; a constant.

        Raises:
            LuthierError: The reference was not asked about these trees before training.
        """
        if self.references is None:
            raise LuthierError("no reference was measured: an objective that asks it sets needs_reference")
        return self.references.sums(pack)

    @contextlib.contextmanager
    def native_attention(self) -> Iterator[None]:
        """Run with the model's own attention, for `generate` and plain forwards."""
        use_native(self.model)
        try:
            yield
        finally:
            self._forward.attach()

    def check(self) -> None:
        """Compare with plain forwards on a few tokens; choose padded batches where values differ.

        A model that cannot take token trees is reported to the logger `luthier` with the reason and the cost.

        Raises:
            ModelError: Not even padded batches give what the model gives for one sequence at a time.
        """
        with undisturbed(self.model), self.autocast():
            pack = _probe(self.model, self.device)
            expected = self._plain(pack)
            faults = []
            for forward in self._candidates():
                fault = self._fault(forward, pack, expected)
                if not fault:
                    break
                faults.append(fault)
            else:
                raise ModelError(
                    f"{type(self.model).__name__} gives other values in a batch: {'; '.join(faults)}"
                )
        self._forward = forward
        if faults:
            log.warning(
                "%s cannot run token trees (%s): it runs on padded batches, which compute a prompt again for "
                "each completion and spend time and memory on padding%s",
                type(self.model).__name__,
                faults[0],
                ", and on the logits of every token" if isinstance(forward, PaddedLogits) else "",
            )

    def _candidates(self) -> list[Forward]:
        head = Head.of(self.model)
        if head is None:
            return [PaddedLogits(self.model)]
        return [TreeForward(self.model, head), PaddedForward(self.model, head), PaddedLogits(self.model)]

    def _plain(self, pack: Pack) -> torch.Tensor:
        use_native(self.model)
        values = []
        for tree in pack.trees:
            for branch in tree.branches:
                ids = torch.tensor([tree.prompt + branch.ids], device=self.device)
                logits = self.model(
                    input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
                ).logits[0, len(tree.prompt) - 1 : -1]
                values.append(
                    logits.float().log_softmax(-1).gather(1, ids[0, len(tree.prompt) :, None])[:, 0]
                )
        return torch.cat(values)

    def _fault(self, forward: Forward, pack: Pack, expected: torch.Tensor) -> str:
        try:
            forward.attach()
            apart = (forward.logprobs(pack) - expected).abs().max().item()
        except Exception as error:  # noqa: BLE001 - a model's own code may fail in any way
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        dtype = self.autocast_dtype or self.model.dtype
        # `not <=`, so that NaN is a fault.
        return "" if apart <= TOLERANCE.get(dtype, 0.3) else f"log-probabilities stray by {apart:.2g}"


def _here(call: Callable[[], Any]) -> Any:
    return call()


@contextlib.contextmanager
def undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Run without gradients and dropout, and leave every module's training mode as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _probe(model: PreTrainedModel, device: torch.device) -> Pack:
    """Two small trees whose values change if anything leaks or is lost; no random state is used."""
    config = model.config.get_text_config().to_dict()
    special = {config.get(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    pool = [token for token in range(min(config["vocab_size"], 1000)) if token not in special]
    ids = tuple(pool[(37 * place + 11) % len(pool)] for place in range(18))
    return Pack.of(
        [Tree(ids[:5], (Branch(ids[5:9]), Branch(ids[9:10]))), Tree(ids[10:13], (Branch(ids[13:18]),))],
        device,
    )
