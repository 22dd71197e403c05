"""What several tests need beyond `luthier.testing`."""

import torch

from luthier.testing.models import BOS, END, START, TEMPLATE, tiny_gpt2, tiny_llama, tiny_tokenizer

__all__ = ["BOS", "END", "START", "TEMPLATE", "plain_values", "tiny_gpt2", "tiny_llama", "tiny_tokenizer"]


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
