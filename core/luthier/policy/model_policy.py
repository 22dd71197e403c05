"""The policy that runs a transformers model, and checks that it answers as the model does."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from luthier.errors import LuthierError, ModelError
from luthier.kernels import fuse, widen
from luthier.models import ScoreHead, head_of, told
from luthier.policy.attention import use_native
from luthier.policy.forward import Forward, PaddedForward, PaddedLogits, TreeForward
from luthier.policy.head import Head
from luthier.policy.policy import Logprobs
from luthier.policy.probe import both_passes, probe, undisturbed
from luthier.policy.references import References
from luthier.trees import Pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from luthier.models import LoadedModel

log = logging.getLogger("luthier")

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}
"""How far a token's log-probability may stray between two orders of the same sums."""


def policy_of(loaded: LoadedModel, fused: bool, wide: bool = False) -> ModelPolicy:
    """Return the checked policy of a loaded model.

    Args:
        loaded: The model, its adapter attached.
        fused: Whether frozen parts are fused, or run as transformers wrote them.
        wide: Whether the residual stream is kept in fp32, where fused norms can read it.
    """
    names = fuse(loaded.model) if fused else {}
    if wide:
        widen(loaded.model, names)
    policy = ModelPolicy(loaded.model, autocast_dtype=loaded.autocast_dtype)
    policy.check()
    return policy


class ModelPolicy:
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
    def path(self) -> str:
        """How packs run: as a ``tree``, or as ``padded`` rows."""
        return self._forward.path

    @property
    def device(self) -> torch.device:
        """Where packs must be."""
        device: torch.device = self.model.device
        return device

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """See `Policy.autocast`."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def logprobs(self, pack: Pack) -> Logprobs:
        """See `Policy.logprobs`."""
        with self.autocast():
            return Logprobs(self.route(lambda: self._forward.logprobs(pack)), pack.offsets)

    def hidden(self, pack: Pack, positions: torch.Tensor) -> torch.Tensor:
        """See `Policy.hidden`."""
        with self.autocast():
            hidden: torch.Tensor = self.route(lambda: self._forward.hidden(pack, positions))
            return hidden

    def scores(self, pack: Pack, positions: torch.Tensor) -> torch.Tensor:
        """See `Policy.scores`."""
        head = self._score_head()
        with self.autocast():
            scores: torch.Tensor = self.route(lambda: head(self._forward.hidden(pack, positions)))
            return scores

    def valued(self, pack: Pack) -> tuple[Logprobs, torch.Tensor]:
        """See `Policy.valued`."""
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
        """See `Policy.reference`."""
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
        """Compare values and gradients of a few tokens with plain passes; choose padded rows if they differ.

        A model that cannot take token trees is reported to the logger `luthier` with the reason and the cost.

        Raises:
            ModelError: The model cannot run, or not even padded batches give what it gives for one sequence
                at a time.
        """
        with undisturbed(self.model), self.autocast():
            pack = probe(self.model, self.device)
            # A config may be wrong in what only a forward pass reads.
            expected = told(type(self.model).__name__, lambda: self._passes(lambda: self._plain(pack)))
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

    def _passes(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `run` gives and its gradient, which is 0 where a kernel has no backward pass."""
        try:
            return both_passes(self.model, run)
        except (NotImplementedError, RuntimeError):
            return run(), torch.zeros((), device=self.device)

    def _fault(self, forward: Forward, pack: Pack, expected: tuple[torch.Tensor, torch.Tensor]) -> str:
        try:
            forward.attach()
            found = self._passes(lambda: forward.logprobs(pack))
        except Exception as error:  # noqa: BLE001 - a model's own code may fail in any way
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        values, gradients = ((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
        allowed = TOLERANCE.get(self.autocast_dtype or self.model.dtype, 0.3)
        # `not <=`, so that NaN is a fault.
        if not values <= allowed:
            return f"log-probabilities stray by {values:.2g}"
        if expected[1].dim() and not gradients <= allowed * expected[1].abs().max().item():
            return f"gradients stray by {gradients:.2g}"
        return ""


def _here(call: Callable[[], Any]) -> Any:
    return call()
