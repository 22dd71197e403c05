"""A few tokens that show whether a way of running packs is right: values, and gradients at the embedding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from luthier.trees import Branch, Pack, Tree

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def probe(model: PreTrainedModel, device: torch.device) -> Pack:
    """Return two small trees whose values change if anything leaks or is lost; no random state is used.

    Every child has several tokens: the first one is predicted from the prompt, and says nothing of its child.
    """
    config = model.config.get_text_config().to_dict()
    named = [config.get(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")]
    special = {token for ids in named for token in (ids if isinstance(ids, list) else [ids])}
    pool = [token for token in range(min(config["vocab_size"], 1000)) if token not in special]
    ids = tuple(pool[(37 * place + 11) % len(pool)] for place in range(21))
    return Pack.of(
        [Tree(ids[:5], (Branch(ids[5:9]), Branch(ids[9:13]))), Tree(ids[13:16], (Branch(ids[16:21]),))],
        device,
    )


def both_passes(model: PreTrainedModel, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Run forward and backward, through every layer but without a gradient of any weight.

    Returns:
        (N,) what `run` gives, and (1000, d) float32, the gradient of a sum of that at each token's embedding.
    """
    embedded: list[tuple[torch.Tensor, torch.Tensor]] = []

    def caught(module: Any, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        embedded.append((inputs[0], out.detach().requires_grad_()))
        return embedded[-1][1]

    hook = model.get_input_embeddings().register_forward_hook(caught)
    try:
        with torch.enable_grad():
            values = run()
            weights = torch.linspace(0.5, 1.5, len(values), device=values.device)  # as alike ones may cancel
            found = torch.autograd.grad((values * weights).sum(), [leaf for _, leaf in embedded])
    finally:
        hook.remove()
    table = found[0].new_zeros(1000, found[0].shape[-1], dtype=torch.float32)
    for (ids, _), gradient in zip(embedded, found, strict=True):
        table.index_add_(0, ids.flatten(), gradient.float().flatten(0, -2))
    return values.detach(), table


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
