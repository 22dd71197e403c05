"""A low-rank update of a parameter that is no linear layer's: an embedding, a router, stacked experts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from luthier.adapters import ParameterChange


class LowRankChange(ParameterChange):
    """``W_e + s·B_e A_e`` for every expert e of W, or of a matrix that counts as one.

    PEFT keeps all A_e and all B_e in one matrix each: A is (E·r, d_in), expert by expert, and B (d_out, r·E),
    whose columns go through the experts first. Both are fp32.

    Attributes:
        embedding: W is an embedding's, (d_in, d_out) with d_in tokens; PEFT has other names for A and B.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float, embedding: bool, transposed: bool) -> None:
        """Start with an update of zero.

        Args:
            weight: W, ([E,] d_out, d_in).
            rank: r.
            scale: s.
            embedding: See above.
            transposed: W is (…, d_in, d_out).
        """
        super().__init__()
        self.scale, self.embedding, self.transposed = scale, embedding, transposed
        self.experts = weight.shape[0] if weight.dim() == 3 else 1
        d_out, d_in = weight.shape[:-3:-1] if transposed else weight.shape[-2:]
        like = torch.empty((), dtype=torch.float32, device=weight.device)
        self.lora_A = nn.Parameter(like.new_zeros(self.experts * rank, d_in))
        self.lora_B = nn.Parameter(like.new_zeros(d_out, rank * self.experts))

    def forward(self, value: Tensor) -> Tensor:
        """Return W with the update, one product for all experts."""
        stack = value if value.dim() == 3 else value[None]  # (E, d_out, d_in), or transposed
        a = self.lora_A.view(self.experts, -1, self.lora_A.shape[1]).to(value.dtype)  # (E, r, d_in)
        b = self.lora_B.view(len(self.lora_B), -1, self.experts).permute(2, 0, 1)  # (E, d_out, r)
        b = b.to(value.dtype)
        left, right = (a.mT, b.mT) if self.transposed else (b, a)
        with torch.autocast(value.device.type, enabled=False):
            return torch.baddbmm(stack, left, right, alpha=self.scale).view(value.shape)

    def tensors(self) -> dict[str, Tensor]:
        """Return A and B by PEFT's names."""
        if self.embedding:
            return {"lora_embedding_A": self.lora_A, "lora_embedding_B": self.lora_B}
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}

    def state(self) -> dict[str, Tensor]:
        """Return A and B by PEFT's names."""
        return {name: tensor.detach() for name, tensor in self.tensors().items()}

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        """A Kaiming-uniform with a = √5, B zero; of an embedding A zero, B normal, as PEFT draws them."""
        if self.embedding:
            self.lora_B.copy_(torch.randn(self.lora_B.shape, generator=generator))
        else:
            drawn = torch.empty(self.lora_A.shape)
            self.lora_A.copy_(nn.init.kaiming_uniform_(drawn, math.sqrt(5), generator=generator))
