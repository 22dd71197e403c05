"""The output head over the scored positions only, in chunks: log-probabilities, never (N, V) logits.

The gradient that reaches a token's log-probability is one number, so the forward pass, which has the
probabilities at hand, already makes each row's gradient up to that number: backward only scales rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from luthier.adapters import base_of
from luthier.policy.row_blocks import blocks_of, logits_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
) -> torch.Tensor:
    """Return the log-probability of every target under ``softmax(cap(scale * (hidden @ weight.T + bias)))``.

    Args:
        hidden: (N, d); the products run in its dtype.
        weight: (V, d), in the dtype of `hidden`.
        bias: (V,) or None.
        targets: (N,) int64.
        softcap: Logits are squeezed into this range by tanh; None for not.
        scale: Factor on the logits.
        chunk: Rows at a time; None for about 32 MB of logits (256 MB on CUDA).

    Returns:
        (N,) float32 (float64 for float64), differentiable in `hidden`, `weight` and `bias`.
    """
    chunk = chunk or logits_rows(len(weight), hidden.device.type)
    terms = _Terms(softcap, scale, chunk, unit=torch.is_grad_enabled() and hidden.requires_grad)
    values: torch.Tensor = _TokenLogprobs.apply(hidden, weight, bias, targets, terms)  # type: ignore[no-untyped-call]
    return values


@dataclass(frozen=True)
class Head:
    """A model's output head as `token_logprobs` wants it.

    Attributes:
        linear: The output projection; its tensors are read at every call, as training may replace them, and
            an adapter may have its own for them.
        softcap: As in Gemma 2.
        scale: As in Cohere and Granite.
    """

    linear: torch.nn.Linear
    softcap: float | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, model: PreTrainedModel) -> Head | None:
        """Describe the head of `model` from its configuration; None where it is not one linear map."""
        linear = model.get_output_embeddings()
        if not isinstance(base_of(linear), torch.nn.Linear):
            return None
        config = model.config.get_text_config().to_dict()
        factors = [config.get(name) or 1.0 for name in ("logit_scale", "lm_head_multiplier")]
        scale = factors[0] * factors[1] / (config.get("logits_scaling") or 1.0)
        return cls(linear, config.get("final_logit_softcapping"), scale)

    def logprobs(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return (N,) log-probabilities of `targets` (N,) after `hidden` (N, d); heeds autocast."""
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        weight: torch.Tensor = self.linear.weight
        low = torch.get_autocast_dtype(device) if autocast else weight.dtype
        bias = None if self.linear.bias is None else self.linear.bias.to(low)
        return token_logprobs(hidden.to(low), weight.to(low), bias, targets, self.softcap, self.scale)


@dataclass(frozen=True)
class _Terms:
    softcap: float | None
    scale: float
    chunk: int
    unit: bool


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        terms: _Terms,
    ) -> torch.Tensor:
        blocks = _Blocks(hidden, weight, bias, targets, terms)
        values = hidden.new_empty(len(hidden), dtype=blocks.wide)
        unit = torch.empty_like(hidden) if terms.unit else hidden.new_empty(0)
        for rows in blocks_of(len(hidden), terms.chunk):
            weights, target = blocks.probabilities(rows, values[rows])
            if terms.unit:
                slope = blocks.slope_(weights, target)
                mean = torch.mm(weights.to(hidden.dtype), weight)
                unit[rows] = (weight[targets[rows]] * slope[:, None] - mean) * terms.scale
        ctx.save_for_backward(hidden, weight, bias, targets, unit)
        ctx.terms = terms
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, unit = ctx.saved_tensors
        grad_hidden = (unit * grad[:, None]).to(hidden.dtype) if ctx.needs_input_grad[0] else None
        if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            return grad_hidden, None, None, None, None
        blocks = _Blocks(hidden, weight, bias, targets, ctx.terms)
        grad_weight = torch.zeros_like(weight, dtype=blocks.wide)
        grad_bias = weight.new_zeros(len(weight), dtype=blocks.wide)
        for rows in blocks_of(len(hidden), ctx.terms.chunk):
            weights, target = blocks.probabilities(rows, grad.new_empty(rows.stop - rows.start))
            factor = grad[rows] * ctx.terms.scale
            slope = blocks.slope_(weights, target) * factor
            weights.mul_(-factor[:, None]).scatter_add_(1, targets[rows, None], slope[:, None])
            grad_bias += weights.sum(0)
            grad_weight += torch.mm(weights.to(hidden.dtype).T, hidden[rows])
        return (
            grad_hidden,
            grad_weight.to(weight.dtype),
            None if bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


class _Blocks:
    """Blocks of (chunk, V) that are made once and filled for one chunk of rows after the other."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        terms: _Terms,
    ) -> None:
        self.hidden, self.weight, self.bias, self.targets, self.terms = hidden, weight, bias, targets, terms
        self.wide = torch.promote_types(hidden.dtype, torch.float32)
        shape = (min(terms.chunk, len(hidden)), len(weight))
        self.product = hidden.new_empty(shape)
        self.logits = self.product if hidden.dtype == self.wide else hidden.new_empty(shape, dtype=self.wide)
        self.weights = hidden.new_empty(shape, dtype=self.wide)

    def probabilities(self, rows: slice, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return probabilities (n, V) and target logits (n, 1); log-probabilities go to `values` (n,)."""
        count = rows.stop - rows.start
        logits, weights, targets = self.logits[:count], self.weights[:count], self.targets[rows, None]
        self._fill(rows, logits)
        target = logits.gather(1, targets)
        torch.softmax(logits, dim=-1, out=weights)
        # log(sum(exp)) from the largest entries, two light passes; exact, as that share is at least 1/V.
        values.copy_((target - logits.amax(1, keepdim=True) + weights.amax(1, keepdim=True).log())[:, 0])
        return weights, target

    def slope_(self, weights: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Multiply `weights` in place by the softcap's slope at each logit; return the targets' (n,)."""
        if self.terms.softcap is None:
            return torch.ones_like(target[:, 0])
        ratio = self.logits[: len(weights)].div_(self.terms.softcap)
        weights.addcmul_(weights, ratio.mul_(ratio), value=-1)
        return 1 - (target[:, 0] / self.terms.softcap) ** 2

    def _fill(self, rows: slice, logits: torch.Tensor) -> None:
        product = self.product[: len(logits)]
        torch.mm(self.hidden[rows], self.weight.T, out=product)
        if self.bias is not None:
            product += self.bias
        if logits.dtype != product.dtype:
            logits.copy_(product)
            self._sharpen(rows, logits)
        if self.terms.scale != 1.0:
            logits.mul_(self.terms.scale)
        if self.terms.softcap is not None:
            logits.div_(self.terms.softcap).tanh_().mul_(self.terms.softcap)

    def _sharpen(self, rows: slice, logits: torch.Tensor) -> None:
        # A 16-bit product rounds a logit of 8 by up to 0.03; for the targets the exact one costs nothing.
        targets = self.targets[rows]
        exact = (self.hidden[rows].to(self.wide) * self.weight[targets]).sum(1)
        if self.bias is not None:
            exact += self.bias[targets]
        logits.scatter_(1, targets[:, None], exact[:, None])
