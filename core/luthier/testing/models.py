"""Toy models and tokenizers, made on the spot: small enough for hundreds of tests."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

BOS, START, END = "<|startoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "What is 12 + 7? The answer is 19.",
    "user assistant system one two three four five",
    "The capital of France is Paris; the sum of 2 and 2 is 4.",
]


def tiny_tokenizer(add_bos: bool = False) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of about 300 tokens with a chat template and no pad token.

    Args:
        add_bos: Put a token before every text, as Llama's tokenizers do.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=[BOS, START, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if add_bos:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, raw.token_to_id(BOS))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """Return a random Llama of two layers, fp32, in eval mode; `overrides` go to its config."""
    options = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    return _spread(LlamaForCausalLM(LlamaConfig(**{**options, **overrides})).eval())


def tiny_gpt2(seed: int = 0, **overrides: Any) -> GPT2LMHeadModel:
    """Return a random GPT-2 of two layers, fp32, in eval mode, whose linear layers are Conv1D."""
    options = {
        "vocab_size": 320,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**{**options, **overrides})).eval()


FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "deepseek_v3": {
        "n_routed_experts": 4, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1,
        "num_experts_per_tok": 2, "first_k_dense_replace": 1, "num_key_value_heads": 4, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}  # fmt: skip
"""Mixtures of experts of other shapes: `tiny_moe` makes one of each."""


def tiny_moe(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a random mixture of four experts in two layers, of one of `FAMILIES`; see `tiny_llama`."""
    options = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "max_position_embeddings": 256,
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**options, **FAMILIES[family], **overrides})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return _spread(model)


def _spread(model: Any) -> Any:
    """Draw the weights of `model` wider: transformers' 0.02 makes softmaxes flat, and mistakes small."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.15)
    return model


class FakeQuantised(nn.Linear):
    """A linear layer that stores int8 in a shape of its own, as quantised layers do.

    Its ``weight`` is not what it computes with: an adapter may run it, or ask `AdaptedLinear.base_weight`.
    """

    scale: torch.Tensor

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__(dense.in_features, dense.out_features, dense.bias is not None, device="meta")
        weight = dense.weight.detach().float()
        self.register_buffer("scale", weight.abs().amax() / 127)
        packed = (weight / self.scale).round().to(torch.int8).view(-1, 1)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = dense.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (…, d_in) to (…, d_out) with the weight read back from int8."""
        weight = self.weight.view(self.out_features, self.in_features).to(x.dtype) * self.scale.to(x.dtype)
        return nn.functional.linear(x, weight, self.bias)


def quantised(model: PreTrainedModel) -> PreTrainedModel:
    """Put a `FakeQuantised` in place of every linear layer of `model` but the output head."""
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, FakeQuantised(module))
    return model
