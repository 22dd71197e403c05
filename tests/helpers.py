"""What several tests need beyond `luthier.testing`."""

import json

import pytest
import torch

from luthier import compose, hookimpl, train
from luthier.registry.method_catalogue import catalogue
from luthier.testing.models import BOS, END, START, TEMPLATE, tiny_gpt2, tiny_llama, tiny_tokenizer

__all__ = ["BOS", "END", "START", "TEMPLATE", "tiny_gpt2", "tiny_llama", "tiny_tokenizer"]


def save_tiny(path, seed=0, **options):
    """Save a tiny Llama that fits the tiny tokenizer, and that, in a folder."""
    tokenizer = tiny_tokenizer()
    tiny_llama(seed, vocab_size=len(tokenizer), **options).save_pretrained(path)
    tokenizer.save_pretrained(path)


def write_rows(path, rows):
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class StopAt:
    """Ends a run at a logging point, as a crash would."""

    def __init__(self, step):
        self.step = step

    @hookimpl
    def after_step(self, report):
        if report.step == self.step:
            raise RuntimeError("the power is gone")


def crash(overrides, step):
    """Train until the logging point at `step`, then fall over."""
    hooks, stop = catalogue().hooks, StopAt(step)
    hooks.register(stop)
    try:
        with pytest.raises(RuntimeError, match="the power is gone"):
            train(compose("train", overrides))
    finally:
        hooks.unregister(stop)


def plain_values(model, trees) -> torch.Tensor:
    """Log-probabilities of the scored tokens, one unpadded sequence at a time through the whole model."""
    values = []
    for tree in trees:
        for branch in tree.branches:
            row = torch.tensor([tree.prompt + branch.ids])
            logprobs = model(row, use_cache=False).logits[0].float().log_softmax(-1)
            for place, wanted in enumerate(branch.scored or (True,) * len(branch.ids), len(tree.prompt)):
                if wanted:
                    values.append(logprobs[place - 1, row[0, place]])
    return torch.stack(values)


def moved(model, seed=1):
    """Give every trained weight a value, as training would."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=g))
    return model
